"""`meta.json`: what a checkpoint holds. It is written last, so without it nothing is complete."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from attnres_train.errors import UserError

META = "meta.json"
FORMAT = 1


class BrokenCheckpoint(UserError):
    """A checkpoint that cannot be loaded: incomplete, damaged, or in an unknown format."""


class TensorSpec(NamedTuple):
    """Shape, dtype (``float32``) and, once saved, CRC-32 of the bytes of one tensor."""

    shape: list[int]
    dtype: str
    crc32: int | None = None

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"

    def like(self, other: TensorSpec) -> bool:
        return (self.shape, self.dtype) == (other.shape, other.dtype)


@dataclass(frozen=True)
class Manifest:
    """Contents of a checkpoint.

    ``serial`` counts publications in a folder: the highest is the newest, also where a run went
    back and passed the same steps again. ``extras`` is the trainer's own JSON, ``rng`` one
    `rng_state` per rank, ``files`` the size in bytes of each file but this one.
    """

    step: int
    serial: int
    extras: dict
    rng: list[dict[str, str]]
    files: dict[str, int]
    tensors: dict[str, TensorSpec]
    format: int = FORMAT


def spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(list(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def with_checksum(tensor: Tensor) -> TensorSpec:
    # Flat first: a scalar cannot be viewed as bytes.
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return spec(tensor)._replace(crc32=zlib.crc32(flat.numpy().data))


def file_sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir())}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``meta.json`` and return once it is on the disk."""
    with open(folder / META, "w") as file:
        json.dump(vars(manifest), file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Return once creations and renames in ``folder`` are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(folder: Path) -> Manifest:
    """Read and check a step folder: every file there, each of its size. Raises BrokenCheckpoint."""
    try:
        content = json.loads((folder / META).read_text())
        if content["format"] != FORMAT:
            raise BrokenCheckpoint(f"{folder}: format {content['format']}, not {FORMAT}")
        content["tensors"] = {n: TensorSpec(*entry) for n, entry in content["tensors"].items()}
        manifest = Manifest(**content)
    except OSError as error:
        raise BrokenCheckpoint(f"{folder}: {META} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError) as error:
        raise BrokenCheckpoint(f"{folder}: {META} is damaged ({error})") from error
    # Sizes find what a full disk or an interrupted copy cuts off, without reading it. Contents are
    # for the checksums, when the tensors are loaded.
    for name, size in manifest.files.items():
        file = folder / name
        found = file.stat().st_size if file.exists() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes of {size}"
            raise BrokenCheckpoint(f"{folder}: {name} {what}")
    return manifest
