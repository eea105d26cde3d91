"""A process that dies in the middle of a save costs that save and nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from attnres_train.checkpoint.folders import find_latest
from attnres_train.checkpoint.store import load, save
from tests.checkpoint.toy import step_folders
from tests.parity.pool import RankFailedError

SAVER = "attnres_train.checkpoint.saver"
PUBLISHING = "attnres_train.checkpoint.publishing"
FOLDERS = "attnres_train.checkpoint.folders"


def put(folder: Path, step: int, value: float) -> Path:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return save(folder, step, {f"a.{rank}": torch.full((2,), value)}, {}, keep_last=1)


def die(*_args, **_kwargs) -> None:
    os._exit(9)


def put_and_die(folder: Path, step: int, where: str, rank: int) -> None:
    if dist.get_rank() != rank:
        put(folder, step, 2.0)
    else:
        with mock.patch(where, die):
            put(folder, step, 2.0)


def values(path: Path) -> list[float]:
    tensors = {f"a.{rank}": torch.zeros(2) for rank in range(2)}
    load(path, tensors)
    return [tensor[0].item() for tensor in tensors.values()]


@pytest.mark.parametrize(
    ("where", "rank", "survivor"),
    [
        (f"{SAVER}.write_tensors", 1, "step_00000001"),
        (f"{SAVER}.checksum", 1, "step_00000001"),
        (f"{PUBLISHING}.write_file", 0, "step_00000001"),
        (f"{PUBLISHING}.folders.publish", 0, "step_00000001"),
        (f"{PUBLISHING}.folders.prune", 0, "step_00000002"),
        (f"{FOLDERS}.shutil.rmtree", 0, "step_00000002"),
    ],
)
def test_the_newest_published_checkpoint_survives(pool, tmp_path, where, rank, survivor):
    pool.run(put, 2, tmp_path, 1, 1.0)
    with pytest.raises(RankFailedError):
        pool.run(put_and_die, 2, tmp_path, 2, where, rank)
    assert find_latest(tmp_path).name == survivor
    assert values(find_latest(tmp_path)) == [2.0 if survivor == "step_00000002" else 1.0] * 2
    pool.run(put, 2, tmp_path, 3, 3.0)
    assert step_folders(tmp_path) == ["step_00000003"]
    assert values(tmp_path / "step_00000003") == [3.0, 3.0]


def put_and_die_between_the_renames(folder: Path) -> None:
    rename = Path.rename

    def rename_but_not_to_the_final_name(path: Path, target: Path) -> Path:
        return die() if Path(target).name == "step_00000001" else rename(path, target)

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
