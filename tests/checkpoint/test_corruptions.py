"""Whatever happens to the newest checkpoint: it is named, never loaded, and the one before is."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from attnres_train.checkpoint.folders import resolve_resume
from attnres_train.checkpoint.manifest import BrokenCheckpoint
from attnres_train.checkpoint.store import load, save
from attnres_train.errors import UserError
from tests.checkpoint.corruptions import Corruption, Place, corruptions, without_rank_1
from tests.checkpoint.toy import Toy

LAYERS = range(2)


def state_of(layers: Iterable[int], step: int, in_parts: bool) -> dict[str, Tensor]:
    """With a part, for each layer, of a table."""
    state = Toy(layers, seed=0).fill(step).state()
    for layer in layers if in_parts else ():
        columns = slice(2 * layer, 2 * layer + 2)
        state[f"table[:, {columns.start}:{columns.stop} of 4]"] = table(step)[:, columns]
    return state


def table(step: int) -> Tensor:
    return torch.arange(12.0).view(3, 4) + step


def save_two_steps(folder: Path, in_parts: bool) -> None:
    for step in (10, 20):
        state = state_of([dist.get_rank()], step, in_parts)
        save(folder / "checkpoints", step, state, {}, keep_last=2)


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "in parts"])
def in_parts(request) -> bool:
    return request.param


@pytest.fixture(scope="module")
def saved(in_parts, pool, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    pool.run(save_two_steps, 2, folder, in_parts)
    save(folder / "alone", 20, state_of(LAYERS, 20, in_parts), {}, keep_last=1)
    return folder


def blank(in_parts: bool) -> dict[str, Tensor]:
    """The state of one process, to be loaded."""
    return Toy(LAYERS, seed=5).state() | ({"table": torch.zeros(3, 4)} if in_parts else {})


def is_of(state: dict[str, Tensor], step: int) -> bool:
    expected = Toy(LAYERS, seed=0).fill(step).state() | {"table": table(step)}
    return all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


@pytest.fixture
def place(saved, tmp_path) -> Place:
    copy = shutil.copytree(saved, tmp_path / "copy")
    steps = [copy / "checkpoints" / f"step_000000{step}" for step in (20, 10)]
    return Place(*steps, alone=copy / "alone" / "step_00000020")


def test_there_are_enough():
    assert len(corruptions()) >= 40
    assert len({case.name for case in corruptions()}) == len(corruptions())


def test_uncorrupted_it_loads(place, in_parts):
    state = blank(in_parts)
    load(place.path, state)
    assert is_of(state, 20)


@pytest.mark.parametrize("case", corruptions(), ids=lambda case: case.name)
def test_it_is_named_and_the_one_before_is_used(place, in_parts, case: Corruption):
    case.change(place)
    state = blank(in_parts)
    with pytest.raises(BrokenCheckpoint) as error:
        load(place.path, state)
    assert str(place.path) in str(error.value)
    assert case.named in str(error.value)

    folder, damaged = place.path.parent, {place.path: str(error.value)}
    found = resolve_resume("auto", folder)
    assert found in (place.path, place.older)  # whether sizes tell it, or the checksums when read
    assert resolve_resume("auto", folder, damaged) == place.older
    load(place.older, state)
    assert is_of(state, 10)


def test_a_rank_that_is_gone_without_a_trace_is_missed_by_name(place, in_parts):
    without_rank_1(place, and_its_files=True)
    told = (
        r"table\[:, 2:4 of 4\] is missing" if in_parts else r"not in the ch.*: model\.layers\.1\."
    )
    with pytest.raises(UserError, match=told):
        load(place.path, blank(in_parts))


def test_files_of_others_do_no_harm(place, in_parts):
    (place.path / "notes.txt").write_text("mine")
    (place.path / ".nfs000000000001").write_text("")
    load(place.path, blank(in_parts))
