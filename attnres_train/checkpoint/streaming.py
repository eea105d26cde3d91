"""Write a checkpoint that is larger than memory: what one of its files holds at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.planner import WriteItem

from attnres_train.checkpoint.manifest import TensorSpec, with_checksum
from attnres_train.checkpoint.rng import rng_state
from attnres_train.checkpoint.store import begin, publish

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
    and dtype, when its turn to be written has come. Files of up to ``file_bytes`` are written one
    after the other (as ranks would theirs), and the tensors of a file are in memory together.
    """
    # The steps of `dcp.save`, which would want every tensor in memory at once.
    unfinished = begin(folder, step)
    planner, writer = _ReadingPlanner(read), dcp.FileSystemWriter(unfinished)
    planner.set_up_planner(tensors, is_coordinator=True)
    writer.set_up_storage_writer(is_coordinator=True)
    whole = writer.prepare_local_plan(planner.create_local_plan())
    files = in_groups(whole.items, lambda item: tensors[item.index.fqn].nbytes, file_bytes)
    # A plan per file, as if each were a rank's: that is how the writer comes to name several files.
    plans, metadata = planner.create_global_plan([replace(whole, items=items) for items in files])
    plans = writer.prepare_global_plan(plans)
    # Each is waited for before the next one begins: its tensors are gone by then.
    writer.finish(metadata, [writer.write_data(plan, planner).wait() for plan in plans])
    report = (planner.written, rng_state())
    return publish(unfinished, step, extras, keep_last, loaded_from=None, reports=[report])


class _ReadingPlanner(dcp.DefaultSavePlanner):
    """Gets values when they are written; keeps what the manifest needs of them."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self.read = read
        self.written: dict[str, TensorSpec] = {}

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        name = write_item.index.fqn
        # Called once per tensor: they are written whole, and read from their source here only.
        tensor = self.read(name)
        self.written[name] = with_checksum(tensor)
        return tensor


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
