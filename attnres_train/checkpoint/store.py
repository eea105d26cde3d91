"""Save a checkpoint and wait for it; load one, whatever layout wrote it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from attnres_train.checkpoint.folders import Keep
from attnres_train.checkpoint.manifest import BrokenCheckpoint, Contents, Manifest, read_manifest
from attnres_train.checkpoint.old_format import read_old
from attnres_train.checkpoint.peers import Peers
from attnres_train.checkpoint.saver import Saver
from attnres_train.checkpoint.tensor_file import TensorSpec, read_tensor, spec
from attnres_train.errors import UserError
from attnres_train.words import some_of

# Names of one rank that do not fit travel up to this number.
_TOLD = 100


@dataclass(frozen=True)
class Restored:
    """What a checkpoint held besides tensors. ``rng`` is this rank's generator state (for
    `rng.set_rng_state`), None where another number of ranks had saved."""

    step: int
    extras: dict
    rng: dict[str, str] | None


def save(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    extras: dict,
    *,
    keep_last: int,
    keep_every: int = 0,
    loaded_from: Path | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint of all ranks' ``tensors`` and publish it as ``folder/step_<step>``, as
    `Saver` does; returns that, on every rank, once it is on the disk.

    Collective over ``group`` (CPU-capable; None: all ranks). Raises RuntimeError, on every rank,
    where it cannot be written: nothing is published then.
    """
    Peers(group).on_first(lambda: folder.mkdir(parents=True, exist_ok=True))
    saver = Saver(folder, tensors, keep=Keep(keep_last, keep_every), group=group)
    saver.start(step, extras, loaded_from)
    outcome = saver.wait()
    assert outcome is not None
    if outcome.path is None:
        raise RuntimeError(outcome.told())
    return outcome.path


def load(
    path: Path,
    tensors: dict[str, Tensor],
    *,
    unread: tuple[str, ...] = (),
    group: dist.ProcessGroup | None = None,
) -> Restored:
    """Fill this rank's ``tensors`` in place from step folder ``path``, whatever layout wrote it.

    Collective over ``group``, whose ranks together must ask for every name in the checkpoint but
    those that start with one of ``unread`` (``("optimizer.",)`` for the weights alone). Views, such
    as one expert of a stack, are written through. Raises UserError, on every rank and before a
    tensor is touched, where names, shapes or dtypes do not fit; BrokenCheckpoint, on every rank,
    where a file is incomplete or a tensor has another checksum than when it was saved.
    """
    peers = Peers(group)
    manifest = peers.on_first(partial(_read_all, path))
    _check_fit(manifest, tensors, unread, peers)
    problems = _read(manifest, tensors)
    peers.decide(problems[:_TOLD], partial(_check_read, path))
    # Generators belong to ranks: of another number of ranks none would be continued.
    same_size = manifest.num_ranks == peers.size
    return Restored(manifest.step, manifest.extras, manifest.rng[peers.rank] if same_size else None)


def _read_all(path: Path) -> Manifest:
    """With its lists: rank 0 reads them for all."""
    manifest = read_manifest(path)
    assert isinstance(manifest.contents, Contents)
    return manifest


def _check_fit(
    manifest: Manifest, tensors: dict[str, Tensor], unread: tuple[str, ...], peers: Peers
) -> None:
    saved = manifest.tensors
    wanted = {name: spec(tensor) for name, tensor in tensors.items()}
    # Together, as a tensor may be missing on one rank because another one asks for it. A byte per
    # tensor of the model travels, not a name.
    asked = torch.tensor([name in wanted for name in saved], dtype=torch.uint8)
    peers.all_reduce_max(asked)
    extra = [
        name
        for name, by_somebody in zip(saved, asked.tolist(), strict=True)
        if not by_somebody and not name.startswith(unread)
    ]
    other = [
        f"{name} ({entry} here, {saved[name]} in the checkpoint)"
        for name, entry in wanted.items()
        if name in saved and not entry.like(saved[name])
    ]
    lacking = [name for name in wanted if name not in saved]
    mine = lacking[:_TOLD], other[:_TOLD]
    peers.decide(mine, partial(_check_together, manifest.folder, extra))


def _check_together(path: Path, extra: list[str], found: list[tuple[list[str], list[str]]]) -> None:
    lines = {
        "not in the checkpoint": sorted({name for lacking, _ in found for name in lacking}),
        "in the checkpoint only": extra,
        "of another kind": sorted({name for _, other in found for name in other}),
    }
    problems = [f"\n  {what}: {some_of(names)}" for what, names in lines.items() if names]
    if problems:
        raise UserError(
            f"checkpoint {path} does not fit this run's model, optimizer.kind or train.precision:"
            + "".join(problems)
        )


def _read(manifest: Manifest, tensors: dict[str, Tensor]) -> list[str]:
    """Read on this rank alone. Returns what went wrong, so that all ranks can fail together."""
    if manifest.is_old:
        return read_old(manifest, tensors)

    def read(item: tuple[str, TensorSpec]) -> str | None:
        name, entry = item
        try:
            read_tensor(manifest.folder, entry, tensors[name])
        except (OSError, ValueError) as error:
            return f"{name} in {entry.file}: {getattr(error, 'strerror', None) or error}"
        return None

    entries = [(name, manifest.tensors[name]) for name in tensors]
    entries.sort(key=lambda item: (item[1].file, item[1].start))  # as they lie on the disk
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as threads:
        return [problem for problem in threads.map(read, entries) if problem]


def _check_read(path: Path, problems: list[list[str]]) -> None:
    damaged = sorted({problem for mine in problems for problem in mine})
    if damaged:
        raise BrokenCheckpoint(f"{path} is damaged: {some_of(damaged)}")
