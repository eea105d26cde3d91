"""Packages by name from PyPI and Debian, by their ordinary clients, and what is in their archives.

Nothing is installed and nothing of a package is run.
"""

from __future__ import annotations

import io
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

_AR = b"!<arch>\n"
_AR_HEADER = 60
_SUFFIXES = (".whl", ".deb")


class FetchError(Exception):
    """A package is not to be had: no network, no client, or no package of that name."""


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    content: bytes


def fetch(client: str, package: str, folder: Path) -> Path:
    """The archive of ``package``, from ``pip`` or ``apt``, in ``folder``, where it stays: one that
    is there is not fetched again. Raises FetchError."""
    place = folder / f"{client}-{package}"
    if found := _archive(place):
        return found
    partial = place.with_name(f"{place.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if client == "pip":
        options = ["--no-deps", "--only-binary=:all:", "--no-input", "-q", "-d", "."]
        _run([sys.executable, "-m", "pip", "download", *options, package], partial)
    else:
        _run(["apt-get", "download", "-q", _real_name(package)], partial)
    if _archive(partial) is None:
        raise FetchError(f"{client} has fetched no archive of {package}")
    partial.rename(place)
    found = _archive(place)
    assert found is not None
    return found


def _archive(folder: Path) -> Path | None:
    return next((file for end in _SUFFIXES for file in folder.glob(f"*{end}")), None)


def _real_name(package: str) -> str:
    """What ``package`` stands for on this Debian: ``linux-source`` is empty, and names the one of
    the kernel's version."""
    told = _run(["apt-cache", "depends", package], Path())
    named = re.findall(rf"Depends: ({re.escape(package)}-[\w.]+)$", told, re.M)
    return named[0] if named else package


def _run(command: list[str], folder: Path) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        raise FetchError(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise FetchError(f"{' '.join(command[:4])} ...: {lines[-1]}")
    return done.stdout


def members(archive: Path, wanted: re.Pattern[str]) -> Iterator[Member]:
    """The files in a wheel or a Debian package whose whole names match ``wanted``, in the order of
    the archive (a wheel: of names)."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            for name in sorted(filter(wanted.fullmatch, file.namelist())):
                yield Member(name, file.read(name))
        return
    with open(archive, "rb") as file:
        yield from tar_members(_data(file, archive), wanted)


def tar_members(stream: IO[bytes], wanted: re.Pattern[str]) -> Iterator[Member]:
    """The same of a tar archive that is read from its beginning, uncompressed."""
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for entry in tar:
            name = entry.name.removeprefix("./")
            if entry.isfile() and wanted.fullmatch(name):
                content = tar.extractfile(entry)
                assert content is not None  # of a file
                yield Member(name, content.read())


def _data(file: IO[bytes], archive: Path) -> IO[bytes]:
    """The files of a Debian package, a tar archive in an ar archive (deb(5))."""
    if file.read(len(_AR)) != _AR:
        raise FetchError(f"{archive} is no Debian package: delete it, to fetch it again")
    while header := file.read(_AR_HEADER):
        name, size = header[:16].decode().strip().rstrip("/"), int(header[48:58])
        if name == "data.tar.xz":
            return lzma.LZMAFile(file)
        if name == "data.tar":
            return io.BytesIO(file.read(size))
        file.seek(size + size % 2, io.SEEK_CUR)
    raise FetchError(f"{archive} holds no data.tar.xz")
