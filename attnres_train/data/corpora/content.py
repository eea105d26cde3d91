"""What input files hold, in few bytes: a file's size and the hash of some blocks of it, so that a
corpus is known again wherever it lies and whenever it was written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from threading import Event
from typing import NamedTuple

# Of a file, NUM_BLOCKS blocks of BLOCK bytes are hashed: the first, the last, and others at equal
# distances between them. A file of no more bytes than that is hashed whole.
BLOCK = 4096
NUM_BLOCKS = 16
# Files are read by this many threads: on a network file system each waits for an answer.
THREADS = 8
READ_AT_ONCE = 1 << 20


class FileContent(NamedTuple):
    """Of one file. ``sampled`` and ``full`` are hashes in hex; ``full`` is None where only blocks
    were asked for."""

    size: int
    sampled: str
    full: str | None
    mtime_ns: int
    """No part of what it holds: tells whether it was written to since it was read."""


def read_contents(files: Sequence[Path], *, full: bool) -> list[FileContent]:
    """What each of ``files`` holds, in their order; ``full`` reads them to their ends.

    Raises OSError for a file that cannot be read.
    """
    stopping = Event()

    def read(share: Sequence[Path]) -> list[FileContent]:
        return [read_content(file, full=full, stopping=stopping.is_set) for file in share]

    shares = [files[start : start + 64] for start in range(0, len(files), 64)]
    with ThreadPoolExecutor(THREADS) as threads:
        try:
            return [content for share in threads.map(read, shares) for content in share]
        except BaseException:  # Ctrl-C too: threads are waited for
            stopping.set()
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def read_content(
    file: Path, *, full: bool, stopping: Callable[[], bool] = lambda: False
) -> FileContent:
    """Raises OSError for a file that cannot be read, and when it is told that it is ``stopping``,
    looked at time and again."""
    with open(file, "rb", buffering=0) as stream:
        stat = os.fstat(stream.fileno())
        sampled = hashlib.sha256()
        for offset, length in blocks(stat.st_size):
            sampled.update(os.pread(stream.fileno(), length, offset))
        whole = _hash_to_end(stream, stopping) if full else None
    return FileContent(stat.st_size, sampled.hexdigest(), whole, stat.st_mtime_ns)


def _hash_to_end(stream: FileIO, stopping: Callable[[], bool]) -> str:
    total = hashlib.sha256()
    while chunk := stream.read(READ_AT_ONCE):
        total.update(chunk)
        if stopping():
            raise InterruptedError
    return total.hexdigest()


def blocks(size: int) -> list[tuple[int, int]]:
    """The (offset, length) of each block that is hashed of a file of ``size`` bytes."""
    if size <= BLOCK * NUM_BLOCKS:
        return [(0, size)]
    last = size - BLOCK
    return [(last * number // (NUM_BLOCKS - 1), BLOCK) for number in range(NUM_BLOCKS)]


def digest_of(rows: Iterable[Sequence[object]]) -> str:
    """Sixteen hex digits that stand for ``rows`` of what JSON can hold, and their order."""
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps(row).encode() + b"\n")
    return total.hexdigest()[:16]


def names_below(files: Sequence[Path], paths: Iterable[str]) -> list[str]:
    """The name of each of ``files`` below that of ``paths`` (a file, a folder or a glob, as in the
    configuration) which led to it: the same wherever those lie.

    Files that no path leads to are named below the folder that holds all of them.
    """
    roots = sorted({_root(path) for path in paths}, key=len, reverse=True)
    found = [_below(str(file), roots) for file in files]
    others = [os.path.abspath(file) for file, name in zip(files, found, strict=True) if not name]
    if not others:
        return [name or "" for name in found]
    common = os.path.commonpath([os.path.dirname(file) for file in others])
    rest = iter(os.path.relpath(file, common) for file in others)
    return [name or next(rest) for name in found]


def _root(path: str) -> str:
    """The folder that stays the same for all files that ``path`` names, with "/" at its end; "" for
    the working directory."""
    if Path(path).is_dir():
        folder = Path(path)
    else:
        parts = Path(path).parts[:-1]
        magic = [number for number, part in enumerate(parts) if set(part) & set("*?[")]
        folder = Path(*parts[: magic[0]] if magic and not Path(path).exists() else parts)
    return "" if folder == Path() else f"{folder}/"


def _below(file: str, roots: Sequence[str]) -> str | None:
    """The name of ``file`` below the first of ``roots`` that it lies in."""
    for root in roots:
        if file.startswith(root) and (root or not os.path.isabs(file)):
            return file[len(root) :]
    return None
