"""Whatever happens to the newest checkpoint: it is named, never loaded, and the one before is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from attnres_train.checkpoint.folders import resolve_resume
from attnres_train.checkpoint.manifest import BrokenCheckpoint
from attnres_train.checkpoint.store import load, save
from attnres_train.errors import UserError
from tests.checkpoint.corruptions import Corruption, Place, corruptions, without_rank_1
from tests.checkpoint.toy import Toy

LAYERS = range(2)


def save_two_steps(folder: Path) -> None:
    for step in (10, 20):
        state = Toy([dist.get_rank()], seed=0).fill(step).state()
        save(folder / "checkpoints", step, state, {}, keep_last=2)


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    pool.run(save_two_steps, 2, folder)
    save(folder / "alone", 20, Toy(LAYERS, seed=0).fill(20).state(), {}, keep_last=1)
    return folder


@pytest.fixture
def place(saved, tmp_path) -> Place:
    copy = shutil.copytree(saved, tmp_path / "copy")
    steps = [copy / "checkpoints" / f"step_000000{step}" for step in (20, 10)]
    return Place(*steps, alone=copy / "alone" / "step_00000020")


def test_there_are_enough():
    assert len(corruptions()) >= 40
    assert len({case.name for case in corruptions()}) == len(corruptions())


def test_uncorrupted_it_loads(place):
    state, expected = Toy(LAYERS, seed=5).state(), Toy(LAYERS, seed=0).fill(20).state()
    load(place.path, state)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


@pytest.mark.parametrize("case", corruptions(), ids=lambda case: case.name)
def test_it_is_named_and_the_one_before_is_used(place, case: Corruption):
    case.change(place)
    state = Toy(LAYERS, seed=5).state()
    with pytest.raises(BrokenCheckpoint) as error:
        load(place.path, state)
    assert str(place.path) in str(error.value)
    assert case.named in str(error.value)

    folder, damaged = place.path.parent, {place.path: str(error.value)}
    found = resolve_resume("auto", folder)
    assert found in (place.path, place.older)  # whether sizes tell it, or the checksums when read
    assert resolve_resume("auto", folder, damaged) == place.older
    load(place.older, state)
    expected = Toy(LAYERS, seed=0).fill(10).state()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_a_rank_that_is_gone_without_a_trace_is_missed_by_name(place):
    without_rank_1(place, and_its_files=True)
    with pytest.raises(UserError, match=r"not in the checkpoint: model\.layers\.1\."):
        load(place.path, Toy(LAYERS, seed=5).state())


def test_files_of_others_do_no_harm(place):
    (place.path / "notes.txt").write_text("mine")
    (place.path / ".nfs000000000001").write_text("")
    load(place.path, Toy(LAYERS, seed=5).state())
