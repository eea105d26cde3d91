"""Write a checkpoint that is larger than memory: what one of its tensors holds at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from attnres_train.checkpoint import folders
from attnres_train.checkpoint.manifest import data_name, list_name, list_of
from attnres_train.checkpoint.publishing import Report, begin, publish
from attnres_train.checkpoint.rng import rng_state
from attnres_train.checkpoint.sealed import sync_folder, write_file
from attnres_train.checkpoint.tensor_file import (
    Layout,
    bytes_of,
    checksum,
    lay_out,
    spec,
    view_of,
    write_tensors,
)

Item = TypeVar("Item")
FILE_BYTES = 5 * 10**9


def save_streamed(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    read: Callable[[str], Tensor],
    extras: dict,
    *,
    keep_last: int,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Publish ``folder/step_<step>`` as `store.save` does, from one process, in little memory.

    ``tensors`` are on the meta device; ``read`` gives the values of one, by name and with its shape
    and dtype, when its turn to be written has come. Files are of up to ``file_bytes``. Raises
    OSError where the disk fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = begin(folder, step)
    checksums: dict[str, int] = {}
    layouts: dict[str, Layout] = {}
    groups = in_groups(tensors, lambda name: tensors[name].nbytes, file_bytes)
    for part, names in enumerate(groups, 1):
        file = data_name(0, part)
        layouts[file] = layout = lay_out(file, {name: spec(tensors[name]) for name in names})
        write_tensors(unfinished / file, layout, _values(layout, read, checksums))
    text, name = list_of(layouts, checksums, rng_state()), list_name(0)
    write_file(unfinished / name, text)
    sync_folder(unfinished)
    report = Report.of(name, text, {file: layout.nbytes for file, layout in layouts.items()})
    keep = folders.Keep(keep_last)
    return publish(unfinished, step, extras, keep, loaded_from=None, reports=[report])


def _values(
    layout: Layout, read: Callable[[str], Tensor], checksums: dict[str, int]
) -> Iterator[memoryview]:
    """The bytes of each tensor of ``layout``; their checksums are kept."""
    for name in layout.tensors:
        view = view_of(bytes_of(read(name)))
        checksums[name] = checksum([view])
        yield view


def in_groups(
    items: Iterable[Item], bytes_of: Callable[[Item], int], limit: int
) -> list[list[Item]]:
    """Consecutive runs of ``items`` of at most ``limit`` bytes; a larger item is alone in its."""
    groups: list[list[Item]] = []
    filled = 0
    for item in items:
        size = bytes_of(item)
        if not groups or filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += size
    return groups
