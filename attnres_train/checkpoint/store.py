"""Save and load checkpoints with torch.distributed.checkpoint.

A save writes into a temporary folder, lists what it holds once every rank is done, and becomes
visible by one rename: at any moment a step folder is complete or not there.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from attnres_train.checkpoint import folders
from attnres_train.checkpoint.manifest import (
    BrokenCheckpoint,
    Manifest,
    TensorSpec,
    file_sizes,
    read_manifest,
    spec,
    with_checksum,
    write_manifest,
)
from attnres_train.checkpoint.old_metadata import SafeReader
from attnres_train.checkpoint.peers import Peers
from attnres_train.checkpoint.rng import rng_state
from attnres_train.errors import UserError


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
    loaded_from: Path | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint of all ranks' ``tensors`` and publish it as ``folder/step_<step>``.

    Collective over ``group`` (CPU-capable; None: all ranks). Names are layout-free; tensors that
    several ranks hold (data-parallel replicas) are written once and must be equal bit for bit.
    ``extras`` is JSON, rank 0's counts. Afterwards only the newest ``keep_last`` checkpoints and
    ``loaded_from`` remain in ``folder``. Returns the published path, on every rank, once it is on
    the disk. Raises RuntimeError where writing fails or replicas differ: nothing is published then.
    """
    peers = Peers(group)
    unfinished = peers.on_first(partial(begin, folder, step))
    with _failures_as(RuntimeError, f"checkpoint of step {step} could not be written"):
        dcp.save(
            tensors,
            storage_writer=dcp.FileSystemWriter(unfinished),
            process_group=group,
            no_dist=not peers.distributed,
        )
    # Of what is in memory, not in the files: `load` compares it with what arrives in memory again,
    # in whatever pieces, and replicas with each other.
    written = {name: with_checksum(tensor) for name, tensor in tensors.items()}
    # Rank 0 publishes once it has all reports: each rank's files are on the disk when it sends its.
    complete = partial(publish, unfinished, step, extras, keep_last, loaded_from)
    return peers.decide((written, rng_state()), complete)


def begin(folder: Path, step: int) -> Path:
    """Make the folder that a checkpoint is written into until it is published in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    folders.remove_partial(folder)
    unfinished = folder / f"{folders.step_name(step)}.tmp-{os.getpid()}"
    unfinished.mkdir()
    return unfinished


def publish(
    unfinished: Path,
    step: int,
    extras: dict,
    keep_last: int,
    loaded_from: Path | None,
    reports: list[tuple[dict[str, TensorSpec], dict[str, str]]],
) -> Path:
    """List what is in ``unfinished`` (a report per rank: its tensors, its `rng_state`), give it its
    final name and delete older checkpoints. Returns the final path."""
    # In this order a crash at any point leaves an older checkpoint or this one: the list comes last
    # into the folder, which gets its name when it is complete; only then are older ones deleted.
    folder = unfinished.parent
    manifest = Manifest(
        step=step,
        serial=folders.next_serial(folder),
        extras=extras,
        rng=[rng for _, rng in reports],
        files=file_sizes(unfinished),
        tensors=_merge([specs for specs, _ in reports]),
    )
    write_manifest(unfinished, manifest)
    published = folders.publish(unfinished, step)
    folders.prune(folder, keep_last, loaded_from)
    return published


def _merge(specs: list[dict[str, TensorSpec]]) -> dict[str, TensorSpec]:
    merged: dict[str, TensorSpec] = {}
    for rank, mine in enumerate(specs):
        differing = [name for name, entry in mine.items() if merged.get(name, entry) != entry]
        if differing:
            raise RuntimeError(
                f"rank {rank} holds other values than a lower rank for {some_of(differing)}: "
                "the replicas have drifted apart"
            )
        merged |= mine
    return merged


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
    tensor is touched, where names, shapes or dtypes do not fit; BrokenCheckpoint where a file is
    incomplete or a tensor has another checksum than when it was saved.
    """
    peers = Peers(group)
    manifest = peers.on_first(partial(read_manifest, path))
    wanted = {name: spec(tensor) for name, tensor in tensors.items()}
    # Together, as a tensor may be missing on one rank because another one asks for it.
    peers.decide(wanted, partial(_check_fit, path, manifest, unread))
    peers.decide(_read(path, tensors, manifest), partial(_check_read, path))
    # Generators belong to ranks: of another number of ranks none would be continued.
    same_size = len(manifest.rng) == peers.size
    return Restored(manifest.step, manifest.extras, manifest.rng[peers.rank] if same_size else None)


def _check_fit(
    path: Path, manifest: Manifest, unread: tuple[str, ...], wanted: list[dict[str, TensorSpec]]
) -> None:
    saved = manifest.tensors
    asked = {name for mine in wanted for name in mine}
    lines = {
        "not in the checkpoint": sorted(asked - saved.keys()),
        "in the checkpoint only": [
            name for name in saved if name not in asked and not name.startswith(unread)
        ],
        "of another kind": sorted(
            {
                f"{name} ({mine[name]} here, {saved[name]} in the checkpoint)"
                for mine in wanted
                for name in mine
                if name in saved and not mine[name].like(saved[name])
            }
        ),
    }
    problems = [f"\n  {what}: {some_of(names)}" for what, names in lines.items() if names]
    if problems:
        raise UserError(
            f"checkpoint {path} does not fit this run's model, optimizer.kind or train.precision:"
            + "".join(problems)
        )


def _read(path: Path, tensors: dict[str, Tensor], manifest: Manifest) -> list[str]:
    """Read on this rank alone. Returns what went wrong, so that all ranks can fail together."""
    try:
        # Without collectives: where one rank's file cannot be read, the others would wait for it.
        with _failures_as(BrokenCheckpoint, "cannot be read"):
            dcp.load(dict(tensors), storage_reader=SafeReader(path), no_dist=True)
    except BrokenCheckpoint as error:
        return [str(error)]
    return [name for name, t in tensors.items() if with_checksum(t) != manifest.tensors[name]]


def _check_read(path: Path, problems: list[list[str]]) -> None:
    damaged = sorted({problem for mine in problems for problem in mine})
    if damaged:
        raise BrokenCheckpoint(f"{path} is damaged: {some_of(damaged)}")


@contextmanager
def _failures_as(kind: type[Exception], message: str) -> Iterator[None]:
    """Turn torch's CheckpointException, which is no Exception, into ``kind`` with its first cause.
    Silence torch's warning about working without peers: where we do, we mean to."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise kind(f"{message} (rank {rank}: {type(cause).__name__}: {cause})") from error


def some_of(names: Iterable[str], shown: int = 5) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest
