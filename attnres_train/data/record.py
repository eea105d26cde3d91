"""What rank 0 has prepared, as other processes are handed it: as text, with the size of each file,
so that a machine that does not see those files says so before step 1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnres_train.data.corpora.content import FileContent, read_contents
from attnres_train.data.prepare import Prepared
from attnres_train.data.samples import Source


def as_record(prepared: Prepared, seen: Mapping[Path, FileContent] | None = None) -> dict[str, Any]:
    """``prepared`` and what its files hold, as JSON can hold it; those of ``seen`` are not read
    again. Raises OSError where a file cannot be read."""
    return {"prepared": asdict(prepared), "files": _contents(files_of(prepared), seen or {})}


def from_record(record: Mapping[str, Any]) -> Prepared:
    """What `as_record` was given."""
    fields = dict(record["prepared"])
    fields["sources"] = [Source.of(source) for source in fields["sources"]]
    return Prepared(**fields)


def files_of(prepared: Prepared) -> list[Path]:
    """Every file that a rank opens: token shards, sample indices, the tokenizer's, the bytes of
    tokens."""
    shards = [
        Path(prefix + end)
        for source in prepared.sources
        for generation in source.generations
        for prefix in generation.prefixes
        for end in (".idx", ".bin")
    ]
    indices = sorted(path for path in Path(prepared.indices).iterdir() if path.is_file())
    others = [Path(one) for one in (prepared.tokenizer_path, prepared.token_bytes) if one]
    return [*shards, *indices, *others]


def is_here(record: Mapping[str, Any]) -> bool:
    """Whether this machine has the files of ``record``, of the same size and with the same bytes
    where `corpora.content` looks."""
    if any(_sizes_that_differ(record)):
        return False
    files = [Path(name) for name in record["files"]]
    try:
        return _contents(files, {}) == record["files"]
    except OSError:
        return False


def missing(record: Mapping[str, Any], most: int = 3) -> list[str]:
    """What this process does not see as ``record`` has it, a sentence each: no more than ``most``,
    and one that counts the rest."""
    found = list(_sizes_that_differ(record))
    more = len(found) - most
    return found[:most] + ([f"{more} more data files are missing or differ"] if more > 0 else [])


def _sizes_that_differ(record: Mapping[str, Any]) -> Iterator[str]:
    for name, (size, _) in record["files"].items():
        try:
            found = Path(name).stat().st_size
        except OSError as error:
            yield f"{name} cannot be read ({error.strerror})"
            continue
        if found != size:
            yield f"{name} has {found:,} bytes, where rank 0 has {size:,}"


def _contents(files: list[Path], seen: Mapping[Path, FileContent]) -> dict[str, list[Any]]:
    """File -> [size, hash of some of its blocks]."""
    unread = [file for file in files if file not in seen]
    contents = {**seen, **dict(zip(unread, read_contents(unread, full=False), strict=True))}
    return {str(file): [contents[file].size, contents[file].sampled] for file in files}
