"""Read whole checkpoints, in little memory: against their checksums, or one against another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attnres_train.checkpoint.manifest import BrokenCheckpoint, Manifest, each_list, read_manifest
from attnres_train.checkpoint.old_format import read_old
from attnres_train.checkpoint.saved import SavedTensor
from attnres_train.checkpoint.tensor_file import (
    TensorSpec,
    bytes_of,
    checksum,
    read_bytes,
    read_part,
)
from attnres_train.errors import UserError
from attnres_train.model.parts import whole

_CHUNK = 2**22


@dataclass(frozen=True)
class Verified:
    """What `verify` has read of a checkpoint, and all that is wrong with it. A part of a tensor
    counts as one."""

    num_tensors: int
    num_bytes: int
    problems: list[str]


def verify(path: Path) -> Verified:
    """Read every byte of step folder ``path`` against its checksum, what is stored twice twice."""
    try:
        manifest = read_manifest(path)
        if manifest.is_old:
            return _verify_old(manifest)
        entries = [item for tensors, _ in each_list(manifest) for item in tensors.items()]
        manifest.contents  # noqa: B018 - parts that are missing or overlap
    except BrokenCheckpoint as error:
        return Verified(0, 0, [str(error).removeprefix(f"{path}: ")])

    def problem_of(item: tuple[str, TensorSpec]) -> str | None:
        name, entry = item
        try:
            found = checksum(read_bytes(path / entry.file, entry.start, entry.nbytes))
        except (OSError, ValueError) as error:
            return f"{name} in {entry.file}: {error}"
        return None if found == entry.crc32 else f"{name} in {entry.file}: other bytes"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        problems = [problem for problem in threads.map(problem_of, entries) if problem]
    return Verified(len(entries), sum(entry.nbytes for _, entry in entries), problems)


def _verify_old(manifest: Manifest) -> Verified:
    problems, entries = [], manifest.tensors.items()
    for name in manifest.tensors:
        try:
            read_one(manifest, name)
        except UserError as error:
            problems.append(str(error))
    return Verified(len(entries), sum(entry.nbytes for _, entry in entries), problems)


def read_one(manifest: Manifest, name: str) -> Tensor:
    """Tensor ``name`` of a checkpoint. Raises BrokenCheckpoint."""
    saved = manifest.tensors[name]
    tensor = saved.empty()
    try:
        if not manifest.is_old:
            for place, entry in saved.parts:
                read_part(manifest.folder, entry, place, tensor, whole(saved.shape))
        elif problems := read_old(manifest, {name: tensor}):
            raise ValueError(problems[0])
    except (OSError, ValueError) as error:
        raise BrokenCheckpoint(f"{manifest.folder}: {name}: {error}") from error
    return tensor


@dataclass(frozen=True)
class Difference:
    """A tensor that two checkpoints do not have alike. ``largest`` is the largest |b - a|,
    ``relative`` is |b - a| / |a| of the whole (Euclidean norms; infinite where a is zero); None
    where ``what`` says that there is nothing to subtract."""

    name: str
    what: str
    largest: float | None = None
    relative: float | None = None


def differences(first: Manifest, second: Manifest) -> Iterator[Difference]:
    """What differs from ``first`` to ``second``, by name. Only tensors with other checksums are
    read, one at a time. Raises BrokenCheckpoint."""
    for name in sorted(first.tensors.keys() | second.tensors.keys()):
        a, b = first.tensors.get(name), second.tensors.get(name)
        if a is None or b is None:
            yield Difference(name, "in the second only" if a is None else "in the first only")
        elif not a.like(b):
            yield Difference(name, f"{a} and {b}")
        elif a.checksums != b.checksums:
            x, y = read_one(first, name), read_one(second, name)
            if _same_parts(a, b) or not torch.equal(bytes_of(x), bytes_of(y)):
                yield _subtracted(name, x, y)


def _same_parts(a: SavedTensor, b: SavedTensor) -> bool:
    return a.checksums.keys() == b.checksums.keys()


def _subtracted(name: str, a: Tensor, b: Tensor) -> Difference:
    largest = squares = base = 0.0
    # In pieces: as fp64, whole tensors would take many times their memory.
    pairs = zip(a.flatten().split(_CHUNK), b.flatten().split(_CHUNK), strict=True)
    for x, y in ((x.double(), y.double()) for x, y in pairs):
        largest = max(largest, float((y - x).abs().max()))
        squares += float((y - x).square().sum())
        base += float(x.square().sum())
    relative = (squares / base) ** 0.5 if base else float("inf")
    return Difference(name, f"{list(a.shape)}", largest, relative)
