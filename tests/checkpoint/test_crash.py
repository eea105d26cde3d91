"""A process that dies in the middle of a save costs that save and nothing else."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from attnres_train.checkpoint.folders import find_latest, scan
from attnres_train.checkpoint.store import load, save
from attnres_train.checkpoint.verify import verify
from tests.checkpoint.toy import step_folders
from tests.parity.pool import RankFailedError

# What a save does to the disk and says to its peers.
POINTS = {
    os: ("write", "fsync", "rename", "mkdir", "rmdir", "unlink", "open"),
    dist: ("gather_object", "broadcast_object_list"),
}


def put(folder: Path, step: int, value: float) -> Path:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return save(folder, step, {f"a.{rank}": torch.full((2,), value)}, {}, keep_last=1)


@contextmanager
def watched(at: Callable[[int], None]) -> Iterator[list[int]]:
    """Call ``at`` with a number before each point of `POINTS` that this process comes to."""
    count = [0]

    def before(original: Callable) -> Callable:
        def call(*args, **kwargs):
            at(count[0])
            count[0] += 1
            return original(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for module, names in POINTS.items():
            for name in names:
                replaced = before(getattr(module, name))
                stack.enter_context(mock.patch.object(module, name, replaced))
        yield count


def number_of_points(folder: Path) -> int:
    put(folder, 1, 1.0)
    with watched(lambda _: None) as count:
        put(folder, 2, 2.0)
    return count[0]


def put_and_die(folder: Path, rank: int, point: int) -> None:
    def die(number: int) -> None:
        if number == point:
            os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() != rank:
        put(folder, 2, 2.0)
    else:
        with watched(die):
            put(folder, 2, 2.0)


def values(path: Path, ranks: int) -> list[float]:
    tensors = {f"a.{rank}": torch.zeros(2) for rank in range(ranks)}
    load(path, tensors)
    return [tensor[0].item() for tensor in tensors.values()]


@pytest.fixture(scope="module")
def points(pool, tmp_path_factory) -> Callable[[int], tuple[list[int], Path]]:
    """For a number of ranks: how many points each comes to, and a folder that has a first step."""

    @cache
    def of(ranks: int) -> tuple[list[int], Path]:
        folder = tmp_path_factory.mktemp("first")
        count = pool.run(number_of_points, ranks, tmp_path_factory.mktemp("count"))
        pool.run(put, ranks, folder, 1, 1.0)
        return count, folder

    return of


# Of one rank, which is quick, and of either of two.
SWEEP = [(1, 0, number / 14) for number in range(14)]
SWEEP += [(2, rank, part) for rank in (0, 1) for part in (0.1, 0.5, 0.9)]


@pytest.mark.parametrize(("ranks", "rank", "part"), SWEEP)
def test_a_kill_anywhere_in_a_save_leaves_the_one_before_or_this_one(
    pool, tmp_path, points, ranks, rank, part
):
    count, first = points(ranks)
    folder = shutil.copytree(first, tmp_path / "run")
    assert count[rank] >= 8
    with pytest.raises(RankFailedError):
        pool.run(put_and_die, ranks, folder, rank, int(part * count[rank]))
    assert [entry.problem for entry in scan(folder) if entry.problem] == []
    newest = find_latest(folder)
    assert verify(newest).problems == []
    assert (
        values(newest, ranks) == [{"step_00000001": 1.0, "step_00000002": 2.0}[newest.name]] * ranks
    )
    if rank == 1:
        assert newest.name == "step_00000001" or part > 0.5
    # In one process, which is quicker: what was left behind is gone.
    path = save(folder, 3, {"b": torch.zeros(1)}, {}, keep_last=1)
    assert step_folders(folder) == [path.name]


def put_and_die_between_the_renames(folder: Path) -> None:
    rename = Path.rename

    def rename_but_not_to_the_final_name(path: Path, target: Path) -> Path:
        return os._exit(9) if Path(target).name == "step_00000001" else rename(path, target)

    with mock.patch.object(Path, "rename", rename_but_not_to_the_final_name):
        put(folder, 1, 2.0)


def test_a_checkpoint_that_is_being_replaced_stays_until_the_new_one_is_there(pool, tmp_path):
    pool.run(put, 1, tmp_path, 1, 1.0)
    with pytest.raises(RankFailedError):
        pool.run(put_and_die_between_the_renames, 1, tmp_path)
    survivor = find_latest(tmp_path)
    assert survivor.name == "step_00000001.replaced"
    tensors = {"a.0": torch.zeros(2)}
    load(survivor, tensors)
    assert tensors["a.0"][0] == 1.0
    pool.run(put, 1, tmp_path, 1, 3.0)
    assert step_folders(tmp_path) == ["step_00000001"]
