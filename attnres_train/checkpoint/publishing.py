"""What rank 0 does for a save: a folder to write into, and its final name once all is there."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from attnres_train.checkpoint import folders
from attnres_train.checkpoint.crc import crc32
from attnres_train.checkpoint.manifest import META, meta_of, unlike
from attnres_train.checkpoint.sealed import sync_folder, write_file

SEEN_SECONDS = 3.0
"""Time that a shared file system has to show rank 0 what another machine has written."""


class Report(NamedTuple):
    """What rank 0 hears of a rank: the checksum of its list, the sizes of its files. That is all
    that travels, be there a thousand ranks."""

    list_name: str
    list_crc32: int
    sizes: dict[str, int]
    in_parts: bool = False
    """Whether it wrote a part of a tensor."""

    @classmethod
    def of(cls, name: str, text: bytes, sizes: dict[str, int], in_parts: bool = False) -> Report:
        return cls(name, crc32(text), {**sizes, name: len(text)}, in_parts)


def begin(folder: Path, step: int) -> Path:
    """Make the folder that a checkpoint is written into until it is published in ``folder``, which
    exists: where it is gone (an unmounted disk), nothing is made in its place."""
    folders.remove_partial(folder)
    unfinished = folder / f"{folders.step_name(step)}.tmp-{os.getpid()}"
    unfinished.mkdir()
    return unfinished


def publish(
    unfinished: Path,
    step: int,
    extras: dict,
    keep: folders.Keep,
    loaded_from: Path | None,
    reports: Sequence[Report],
) -> Path:
    """Say in ``unfinished`` what is there (by a report per rank), give it its final name and delete
    older checkpoints. Returns the final path. Raises FileNotFoundError where a file that a rank has
    written is not to be seen here, OSError where the disk fails."""
    # In this order a crash at any point leaves an older checkpoint or this one: what it holds is
    # said last, and it gets its name when it is complete; only then are older ones deleted.
    folder = unfinished.parent
    files = {name: size for report in reports for name, size in report.sizes.items()}
    if problem := _awaited(unfinished, files):
        raise FileNotFoundError(
            f"{unfinished / problem} for this rank, though its rank has written it: run.dir has to "
            "be on a disk that all machines share"
        )
    lists = {report.list_name: report.list_crc32 for report in reports}
    in_parts = any(report.in_parts for report in reports)
    text = meta_of(step, folders.next_serial(folder), extras, files, lists, in_parts)
    write_file(unfinished / META, text)
    sync_folder(unfinished)
    published = folders.publish(unfinished, step)
    folders.prune(folder, keep, loaded_from)
    return published


def _awaited(folder: Path, files: dict[str, int]) -> str | None:
    deadline = time.monotonic() + SEEN_SECONDS
    while (problem := unlike(folder, files)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return problem
