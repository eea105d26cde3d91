"""Files of tensors, in the safetensors format: a JSON header, then the tensors' bytes without gaps.

Written here and not by the library, as bytes come from buffers in pieces and are to be on the disk
when the call returns; read here, as a tensor is read straight into its memory and checksummed on
the way. Any safetensors reader opens the files.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from attnres_train.checkpoint.crc import crc32
from attnres_train.model.parts import Place, common, indices, narrowed

# torch's name of a dtype -> the format's.
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
_CHUNK_BYTES = 2**24


class TensorSpec(NamedTuple):
    """Shape and dtype (``float32``) of one tensor; once saved, CRC-32 of its bytes, and the file in
    which they begin at byte ``start``."""

    shape: list[int]
    dtype: str
    crc32: int | None = None
    file: str = ""
    start: int = 0

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"

    def like(self, other: TensorSpec) -> bool:
        return (self.shape, self.dtype) == (other.shape, other.dtype)

    @property
    def itemsize(self) -> int:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype.itemsize

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


def spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(list(tensor.shape), str(tensor.dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Layout:
    """What a file is to hold: its header and, in its order, where each tensor begins."""

    header: bytes
    tensors: dict[str, TensorSpec]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(entry.nbytes for entry in self.tensors.values())


def lay_out(file: str, specs: Mapping[str, TensorSpec]) -> Layout:
    """Place tensors of ``specs`` in ``file``. Raises ValueError for a dtype that the format does
    not have."""
    unknown = sorted({entry.dtype for entry in specs.values()} - _DTYPES.keys())
    if unknown:
        raise ValueError(f"tensors of dtype {', '.join(unknown)} cannot be saved")
    # Larger elements first: each then begins at a multiple of its size.
    ordered = dict(sorted(specs.items(), key=lambda item: -item[1].itemsize))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in ordered.items():
        begin, end = end, end + entry.nbytes
        entries[name] = {
            "dtype": _DTYPES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    placed, start = {}, len(header)
    for name, entry in ordered.items():
        placed[name] = entry._replace(file=file, start=start)
        start += entry.nbytes
    return Layout(header, placed)


def write_tensors(path: Path, layout: Layout, pieces: Iterable[memoryview]) -> None:
    """Write ``layout``'s file from the bytes of its tensors in order, in ``pieces`` of any size.
    Returns once it is on the disk. Raises OSError."""
    with open(path, "wb", buffering=0) as file:
        written = _write_all(file.fileno(), memoryview(layout.header))
        for piece in pieces:
            written += _write_all(file.fileno(), piece)
        assert written == layout.nbytes, f"{written} bytes for {path}, not {layout.nbytes}"
        os.fsync(file.fileno())


def _write_all(handle: int, data: memoryview) -> int:
    done = 0
    while done < len(data):
        count = os.write(handle, data[done : done + _CHUNK_BYTES])
        done += count
        if hasattr(os, "posix_fadvise"):
            # Begin to write to the disk now, not when all is to be there (on Linux).
            end = os.lseek(handle, 0, os.SEEK_CUR)
            os.posix_fadvise(handle, end - count, count, os.POSIX_FADV_DONTNEED)
    return done


def bytes_of(tensor: Tensor) -> Tensor:
    """``tensor`` as uint8, flat; shares its memory where it is contiguous."""
    # Flat first: a scalar cannot be viewed as bytes.
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def view_of(flat: Tensor) -> memoryview:
    """The memory of a flat uint8 tensor on the CPU."""
    view: memoryview = flat.numpy().data
    return view


def checksum(pieces: Iterable[memoryview]) -> int:
    """CRC-32 of bytes that come in pieces."""
    value = 0
    for piece in pieces:
        value = crc32(piece, value)
    return value


def read_tensor(folder: Path, entry: TensorSpec, target: Tensor) -> None:
    """Fill ``target``, of ``entry``'s shape and dtype, in place. Raises OSError, and ValueError
    where the file is too short or the bytes have another checksum; ``target`` is undefined then."""
    direct = target.device.type == "cpu" and target.is_contiguous()
    flat = bytes_of(target) if direct else torch.empty(entry.nbytes, dtype=torch.uint8)
    if checksum(_read_into(folder / entry.file, entry.start, view_of(flat))) != entry.crc32:
        raise ValueError("other bytes than were saved")
    if not direct:
        target.copy_(flat.view(target.dtype).view(target.shape))


def read_part(folder: Path, entry: TensorSpec, place: Place, target: Tensor, wanted: Place) -> None:
    """Fill of ``target``, which lies at ``wanted`` in a tensor, what it has in common with the part
    at ``place`` that ``entry`` is: all of that is read, as it has one checksum, but little of it is
    in memory at a time. Raises as `read_tensor` does."""
    if place == wanted:
        read_tensor(folder, entry, target)
        return
    value, first = 0, 0
    row = entry.nbytes // max(1, entry.shape[0])
    rows = max(1, _CHUNK_BYTES // max(1, row))
    for piece in read_bytes(folder / entry.file, entry.start, entry.nbytes, rows * row):
        value = crc32(piece, value)
        count = len(piece) // row
        here = narrowed(place, 0, first, first + count)
        if both := common(here, wanted):
            block = torch.frombuffer(piece, dtype=target.dtype).view(count, *entry.shape[1:])
            target[indices(both, wanted)].copy_(block[indices(both, here)])
        first += count
    if value != entry.crc32:
        raise ValueError("other bytes than were saved")


def read_bytes(
    path: Path, start: int, count: int, at_a_time: int = _CHUNK_BYTES
) -> Iterator[memoryview]:
    """``count`` bytes of a file from ``start`` on, in pieces that are valid until the next one.
    Raises OSError, and ValueError where the file is too short."""
    buffer = memoryview(bytearray(min(count, at_a_time)))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while count:
            piece = buffer[: min(count, at_a_time)]
            _fill(file.fileno(), piece)
            yield piece
            count -= len(piece)


def _read_into(path: Path, start: int, view: memoryview) -> Iterator[memoryview]:
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        for begin in range(0, len(view), _CHUNK_BYTES):
            piece = view[begin : begin + _CHUNK_BYTES]
            _fill(file.fileno(), piece)
            yield piece


def _fill(handle: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = os.readv(handle, [view[done:]])
        if not count:
            raise ValueError("the file is too short")
        done += count
