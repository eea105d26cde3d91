"""What a checkpoint holds: `meta.json`, and a list of tensors per rank that it names.

step_00000100/
    rank_00000.safetensors   what rank 0 writes of the tensors; not there if that is nothing
    rank_00000.json          where in it they are, their checksums, the rank's generators
    rank_00001.*             ...
    meta.json                step, progress, configuration; size of each file, checksum of each list

`meta.json` is written last, so without it nothing is complete. Where a tensor lies in parts, their
names say which they are (`model.parts`), and the format is 3. Format 1, of before, had one list of
tensors in it and files of torch.distributed.checkpoint; it is read still (`old_format`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from attnres_train.checkpoint.crc import crc32
from attnres_train.checkpoint.saved import SavedTensor, assembled
from attnres_train.checkpoint.sealed import is_sealed, seal
from attnres_train.checkpoint.tensor_file import Layout, TensorSpec, checksum, lay_out, read_bytes
from attnres_train.errors import UserError

META = "meta.json"
FORMAT, FORMAT_OF_PARTS = 2, 3
OWN_NAMES = "rank_*"


class BrokenCheckpoint(UserError):
    """A checkpoint that cannot be loaded: incomplete, damaged, or in an unknown format."""


@dataclass(frozen=True)
class Contents:
    """Every tensor of a checkpoint by name, and one `rng_state` per rank that wrote it."""

    tensors: dict[str, SavedTensor]
    rng: list[dict[str, str]]


@dataclass(frozen=True)
class Manifest:
    """What `meta.json` says.

    ``serial`` counts publications in a folder: the highest is the newest, also where a run went
    back and passed the same steps again. ``extras`` is the trainer's own JSON, ``files`` the size
    in bytes of each file but this one, ``lists`` the CRC-32 of every rank's list, by rank.
    """

    folder: Path
    step: int
    serial: int
    extras: dict
    files: dict[str, int]
    lists: dict[str, int] = field(default_factory=dict)
    inline: Contents | None = None
    """Of a checkpoint in format 1."""

    @property
    def is_old(self) -> bool:
        return self.inline is not None

    @property
    def num_ranks(self) -> int:
        """Processes that wrote it."""
        return len(self.inline.rng) if self.inline else len(self.lists)

    @cached_property
    def contents(self) -> Contents:
        """From the lists, when first asked for. Raises BrokenCheckpoint."""
        return self.inline or _read_lists(self)

    @property
    def tensors(self) -> dict[str, SavedTensor]:
        return self.contents.tensors

    @property
    def rng(self) -> list[dict[str, str]]:
        return self.contents.rng


def list_name(rank: int) -> str:
    return f"rank_{rank:05d}.json"


def data_name(rank: int, part: int | None = None) -> str:
    """Of a rank's file, or of one of several."""
    return f"rank_{rank:05d}{'' if part is None else f'_{part:05d}'}.safetensors"


def list_of(
    layouts: Mapping[str, Layout], checksums: Mapping[str, int], rng: Mapping[str, str]
) -> bytes:
    """A rank's list: its files (size, checksum of the header), and its tensors (shape, dtype,
    checksum, file, first byte)."""
    tensors = {
        name: [entry.shape, entry.dtype, checksums[name], entry.file, entry.start]
        for layout in layouts.values()
        for name, entry in layout.tensors.items()
    }
    files = {name: [part.nbytes, crc32(part.header)] for name, part in layouts.items()}
    return seal({"files": files, "tensors": tensors, "rng": rng})


def meta_of(
    step: int,
    serial: int,
    extras: dict,
    files: dict[str, int],
    lists: dict[str, int],
    in_parts: bool,
) -> bytes:
    # Where all are whole, code that knows of no parts reads it.
    version = FORMAT_OF_PARTS if in_parts else FORMAT
    content = {"format": version, "step": step, "serial": serial, "extras": extras}
    return seal(content | {"files": files, "lists": lists})


def read_manifest(folder: Path) -> Manifest:
    """Read and check a step folder: every file there, each of its size. Raises BrokenCheckpoint."""
    try:
        data = (folder / META).read_bytes()
        content = json.loads(data)
        version = content.pop("format")
        if version not in (1, FORMAT, FORMAT_OF_PARTS):
            raise BrokenCheckpoint(f"{folder}: format {version}, not {FORMAT_OF_PARTS}")
        manifest = _old(folder, content) if version == 1 else _new(folder, content, data)
    except OSError as error:
        raise BrokenCheckpoint(f"{folder}: {META} cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BrokenCheckpoint(f"{folder}: {META} is damaged ({error})") from error
    # Sizes find what a full disk or an interrupted copy cuts off, without reading it. Contents are
    # for the checksums, when the tensors are loaded.
    if problem := unlike(folder, manifest.files):
        raise BrokenCheckpoint(f"{folder}: {problem}")
    if foreign := {path.name for path in folder.glob(OWN_NAMES)} - manifest.files.keys():
        raise BrokenCheckpoint(f"{folder}: {min(foreign)} is of another checkpoint")
    return manifest


def _new(folder: Path, content: dict[str, Any], data: bytes) -> Manifest:
    if not is_sealed(data):
        raise ValueError("its checksum is another one")
    del content["crc32"]
    return Manifest(folder, **content)


def _old(folder: Path, content: dict[str, Any]) -> Manifest:
    tensors = [(n, TensorSpec(*entry)) for n, entry in content.pop("tensors").items()]
    inline = Contents(assembled(tensors), content.pop("rng"))
    return Manifest(folder, **content, inline=inline)


def unlike(folder: Path, files: Mapping[str, int]) -> str | None:
    """What is wrong with the first of ``files``, name to bytes, that is not there as it must be."""
    for name, size in files.items():
        try:
            found = (folder / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != size:
            return f"{name} has {found} bytes of {size}"
    return None


def _read_lists(manifest: Manifest) -> Contents:
    lists = list(each_list(manifest))
    try:
        tensors = assembled(item for entries, _ in lists for item in entries.items())
    except ValueError as error:
        raise BrokenCheckpoint(f"{manifest.folder}: {error}") from error
    return Contents(tensors, [rng for _, rng in lists])


def each_list(manifest: Manifest) -> Iterator[tuple[dict[str, TensorSpec], dict[str, str]]]:
    """What every rank wrote of tensors, by name, and its generators. Raises BrokenCheckpoint."""
    for name, expected in manifest.lists.items():
        try:
            data = (manifest.folder / name).read_bytes()
            if crc32(data) != expected:
                raise ValueError("its checksum is another one")
            mine = json.loads(data)
            entries = {n: TensorSpec(*entry) for n, entry in mine["tensors"].items()}
            _check_headers(manifest, mine["files"], entries)
        except (OSError, ValueError, TypeError, KeyError) as error:
            why = f"{manifest.folder}: {name} is damaged ({error})"
            raise BrokenCheckpoint(why) from error
        yield entries, mine["rng"]


def _check_headers(
    manifest: Manifest, files: Mapping[str, list[int]], entries: Mapping[str, TensorSpec]
) -> None:
    """Raises ValueError where the files' headers do not say what the list says."""
    for name, (nbytes, header_crc) in files.items():
        inside = {n: entry for n, entry in entries.items() if entry.file == name}
        header = len(lay_out(name, inside).header)
        if manifest.files.get(name) != nbytes:
            raise ValueError(f"{name} is not the file that it lists")
        try:
            found = checksum(read_bytes(manifest.folder / name, 0, header))
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error.strerror}") from error
        if found != header_crc:
            raise ValueError(f"the header of {name} has another checksum")
