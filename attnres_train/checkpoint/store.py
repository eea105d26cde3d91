"""Save a checkpoint and wait for it; load one, whatever layout wrote it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from attnres_train.checkpoint.folders import Keep
from attnres_train.checkpoint.manifest import BrokenCheckpoint, Contents, Manifest, read_manifest
from attnres_train.checkpoint.old_format import read_old
from attnres_train.checkpoint.peers import Peers
from attnres_train.checkpoint.saved import SavedPart, SavedTensor, check_cover
from attnres_train.checkpoint.saver import Saver
from attnres_train.checkpoint.tensor_file import read_part, spec
from attnres_train.errors import UserError
from attnres_train.model.parts import (
    Place,
    common,
    indices,
    is_part,
    is_whole,
    named,
    parsed,
    whole,
    whole_shape,
)
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

    Collective over ``group``, whose ranks together must ask for everything in the checkpoint but
    what starts with one of ``unread`` (``("optimizer.",)`` for the weights alone). A name may be
    that of any part of a tensor (`model.parts`), however it lies in the files. Views, such as one
    expert of a stack, are written through. Raises UserError, on every rank and before a tensor is
    touched, where names, shapes or dtypes do not fit, and BrokenCheckpoint where parts are missing
    or overlap; later BrokenCheckpoint, on every rank, where a file is incomplete or a part has
    another checksum than when it was saved.
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


class _Wanted(NamedTuple):
    """What a tensor of this rank is a part of, or the whole of."""

    name: str
    place: Place
    dtype: str

    @classmethod
    def of(cls, text: str, tensor: Tensor) -> _Wanted:
        return cls(*parsed(text, tensor.shape), spec(tensor).dtype)

    def fits(self, saved: SavedTensor) -> bool:
        return (whole_shape(self.place), self.dtype) == (saved.shape, saved.dtype)

    def __str__(self) -> str:
        return f"{whole_shape(self.place)} {self.dtype}"


def _check_fit(
    manifest: Manifest, tensors: dict[str, Tensor], unread: tuple[str, ...], peers: Peers
) -> None:
    saved = manifest.tensors
    wanted = {text: _Wanted.of(text, tensor) for text, tensor in tensors.items()}
    # Together, as a tensor may be missing on one rank because another one asks for it. A byte per
    # tensor of the model travels, not a name; places of parts do.
    names = {part.name for part in wanted.values()}
    wholes = {part.name for part in wanted.values() if is_whole(part.place)}
    asked = torch.tensor([(n in names) + (n in wholes) for n in saved], dtype=torch.uint8)
    peers.all_reduce_max(asked)
    by_somebody = dict(zip(saved, asked.tolist(), strict=True))
    extra = [name for name, how in by_somebody.items() if not how and not name.startswith(unread)]
    other = [
        f"{text} ({part} here, {saved[part.name]} in the checkpoint)"
        for text, part in wanted.items()
        if part.name in saved and not part.fits(saved[part.name])
    ]
    lacking = [text for text, part in wanted.items() if part.name not in saved]
    mine = lacking[:_TOLD], other[:_TOLD]
    peers.decide(mine, partial(_check_together, manifest.folder, extra))
    in_parts = [(p.name, p.place) for p in wanted.values() if by_somebody[p.name] == 1]
    peers.decide(in_parts, _check_asked)


def _check_asked(by_rank: list[list[tuple[str, Place]]]) -> None:
    """Nothing of a tensor is to be left out because no rank asks for it."""
    places: dict[str, list[Place]] = {}
    for name, place in (part for mine in by_rank for part in mine):
        places.setdefault(name, []).append(place)
    for name, found in places.items():
        try:
            check_cover(name, found, once=False)
        except ValueError as error:
            raise RuntimeError(f"{error}: no rank asks for it") from error


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
        return _read_old(manifest, tensors)

    def read(item: tuple[str, Tensor, Place, SavedPart]) -> str | None:
        name, tensor, wanted, (place, entry) = item
        try:
            read_part(manifest.folder, entry, place, tensor, wanted)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            return f"{named(name, place)} in {entry.file}: {why}"
        return None

    parts = []
    for text, tensor in tensors.items():
        name, wanted = parsed(text, tensor.shape)
        for part in manifest.tensors[name].parts:
            if part.place == wanted or common(part.place, wanted):
                parts.append((name, tensor, wanted, part))
    parts.sort(key=lambda item: (item[3].entry.file, item[3].entry.start))  # as on the disk
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as threads:
        return [problem for problem in threads.map(read, parts) if problem]


def _read_old(manifest: Manifest, tensors: dict[str, Tensor]) -> list[str]:
    """Checksums are of whole tensors there: what is asked for in part is read whole."""
    wholes = {text: tensor for text, tensor in tensors.items() if not is_part(text)}
    problems = read_old(manifest, wholes) if wholes else []
    for text, tensor in tensors.items():
        if is_part(text):
            name, place = parsed(text, tensor.shape)
            saved = manifest.tensors[name].empty()
            problems += read_old(manifest, {name: saved})
            tensor.copy_(saved[indices(place, whole(saved.shape))])
    return problems


def _check_read(path: Path, problems: list[list[str]]) -> None:
    damaged = sorted({problem for mine in problems for problem in mine})
    if damaged:
        raise BrokenCheckpoint(f"{path} is damaged: {some_of(damaged)}")
