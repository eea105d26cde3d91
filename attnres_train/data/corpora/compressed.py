"""Files that are read as they are or, where they are compressed, as what is in them."""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

from attnres_train.errors import UserError

DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)
"""What reading a damaged or truncated compressed file raises."""


class Form(NamedTuple):
    name: str
    begins: bytes
    """The first bytes of every such file, which no JSON has."""
    open: Callable[[Any, Path], IO[bytes]]


def _gzip(raw: Any, file: Path) -> IO[bytes]:
    return io.BufferedReader(gzip.GzipFile(fileobj=raw))


def _bzip2(raw: Any, file: Path) -> IO[bytes]:
    return bz2.BZ2File(raw)


def _xz(raw: Any, file: Path) -> IO[bytes]:
    return lzma.LZMAFile(raw)


def _zstd(raw: Any, file: Path) -> IO[bytes]:
    try:
        return importlib.import_module("compression.zstd").open(raw)  # Python 3.14
    except ImportError:
        pass
    try:
        pyarrow = importlib.import_module("pyarrow")
    except ImportError:
        raise UserError(
            f"{file} is compressed by zstd, which needs pyarrow here: pip install "
            "'attnres-train[data]', or compress it by gzip, bzip2 or xz"
        ) from None
    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))


FORMS = {
    ".gz": Form("gzip", b"\x1f\x8b", _gzip),
    ".bz2": Form("bzip2", b"BZh", _bzip2),
    ".xz": Form("xz", b"\xfd7zXZ\x00", _xz),
    ".zst": Form("zstd", b"\x28\xb5\x2f\xfd", _zstd),
}
"""By the end of a file's name. What is read goes by the first bytes: many have another name."""


def open_maybe_compressed(raw: IO[bytes], file: Path) -> IO[bytes]:
    """What is in the open ``file``. Raises UserError where it is not compressed, but named so."""
    head = raw.read(8)
    raw.seek(0)
    for form in FORMS.values():
        if head.startswith(form.begins):
            return form.open(raw, file)
    if named := FORMS.get(file.suffix.lower()):
        raise UserError(
            f"{file} is no {named.name} file, though named so: it begins with {head!r} (byte 0)"
        )
    return raw
