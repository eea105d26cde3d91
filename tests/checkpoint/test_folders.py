from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from attnres_train.checkpoint.folders import KEEP_BEFORE, Keep, find_latest, resolve_resume, scan
from attnres_train.checkpoint.store import load, save
from attnres_train.errors import UserError
from tests.checkpoint.toy import step_folders


def put(folder: Path, step: int, value: float = 0.0, keep_last: int = 9, **options) -> Path:
    tensors = {"a": torch.full((2,), value)}
    return save(folder, step, tensors, {}, keep_last=keep_last, **options)


def value_of(path: Path) -> float:
    tensors = {"a": torch.zeros(2)}
    load(path, tensors)
    return tensors["a"][0].item()


@pytest.fixture
def own(tmp_path) -> Path:
    return tmp_path / "runs" / "mine" / "checkpoints"


def test_keep_last(own):
    for step in (1, 2, 3, 4):
        put(own, step, keep_last=2)
    assert step_folders(own) == ["step_00000003", "step_00000004"]


def test_the_checkpoint_that_was_loaded_stays(own):
    first = put(own, 1)
    for step in (2, 3, 4):
        put(own, step, keep_last=1, loaded_from=first)
    assert step_folders(own) == ["step_00000001", "step_00000004"]


def test_a_run_that_starts_over_is_newer_than_what_it_left(own):
    for step in (10, 20):
        put(own, step, value=1.0, keep_last=2)
    put(own, 5, value=2.0, keep_last=2)
    assert step_folders(own) == ["step_00000005", "step_00000020"]
    assert find_latest(own).name == "step_00000005"
    put(own, 20, value=2.0, keep_last=2)
    assert step_folders(own) == ["step_00000005", "step_00000020"]
    assert value_of(find_latest(own)) == 2.0


def test_saving_a_step_again_replaces_it(own):
    for value in (1.0, 2.0, 3.0):
        put(own, 4, value=value)
    assert step_folders(own) == ["step_00000004"]
    assert value_of(own / "step_00000004") == 3.0


def test_broken_checkpoints_are_passed_over_reported_and_not_counted(own, caplog):
    for step in (1, 2, 3):
        put(own, step)
    (own / "step_00000003" / "meta.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert resolve_resume("auto", own) == own / "step_00000002"
    assert "step_00000003: meta.json cannot be read" in caplog.text
    put(own, 4, keep_last=2)
    assert step_folders(own) == [f"step_0000000{step}" for step in (2, 3, 4)]


def test_leftovers_are_ignored_and_removed_by_the_next_save(own):
    put(own, 1)
    (own / "step_00000002.tmp-77").mkdir()
    (own / "step_00000002.tmp-77" / "meta.json").write_text("{}")
    (own / "notes").mkdir()
    assert find_latest(own) == own / "step_00000001"
    put(own, 3)
    assert step_folders(own) == ["notes", "step_00000001", "step_00000003"]


def test_auto_without_any_checkpoint_and_never_start_from_the_beginning(own):
    assert find_latest(own) is None
    assert resolve_resume("auto", own) is None
    put(own, 1)
    assert resolve_resume("never", own) is None
    assert resolve_resume("auto", own) == own / "step_00000001"


def test_auto_with_broken_checkpoints_only_is_an_error(own):
    (put(own, 1) / "rank_00000.json").unlink()
    with pytest.raises(
        UserError, match=r"(?s)step_00000001 \(rank_00000.json is missing\).*resume=never"
    ):
        resolve_resume("auto", own)


@pytest.mark.parametrize("path", ["runs/other", "runs/other/checkpoints", "{step}", "copy"])
def test_a_path_wins_over_the_runs_own_checkpoints(tmp_path, own, path):
    put(own, 9)
    other = tmp_path / "runs" / "other" / "checkpoints"
    put(other, 1)
    newest = put(other, 2)
    if path == "copy":
        newest = newest.rename(tmp_path / "copy")
    target = path.format(step=newest)
    assert resolve_resume(str(tmp_path / target), own) == newest


def test_an_older_step_can_be_asked_for(own):
    first = put(own, 1)
    put(own, 2)
    assert resolve_resume(str(first), own) == first


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("runs/mine/checkpoints/step_00000007", "no such folder"),
        ("runs/mine/checkpoints/step_00000002", "rank_00000.safetensors has"),
        ("runs/gone", "no such folder"),
        ("empty", "no complete checkpoint in it"),
    ],
)
def test_a_path_without_a_checkpoint_lists_what_exists(tmp_path, own, path, problem):
    put(own, 1)
    data = put(own, 2) / "rank_00000.safetensors"
    data.write_bytes(data.read_bytes()[:100])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as error:
        resolve_resume(str(tmp_path / path), own)
    first, *listing = str(error.value).splitlines()
    assert first.startswith(f"checkpoint.resume={tmp_path / path}: {problem}")
    assert len(listing) == 2
    assert f"  {own / 'step_00000001'} (complete)" in listing


def test_a_path_where_nothing_exists_says_so(tmp_path, own):
    with pytest.raises(UserError, match="Checkpoints that exist: none"):
        resolve_resume(str(tmp_path / "gone"), own)


def test_keep_every(own):
    for step in range(10, 80, 10):
        put(own, step, keep_last=1, keep_every=30)
    assert step_folders(own) == ["step_00000030", "step_00000060", "step_00000070"]


def put_after_spikes(own: Path, step: int, *bounds: int) -> None:
    extras = {KEEP_BEFORE: list(bounds)}
    save(own, step, {"a": torch.zeros(2)}, extras, keep_last=1)


def test_the_newest_from_before_a_spike_stays(own):
    for step, *bounds in ((10,), (20,), (30, 25), (40, 25), (50, 25, 45), (60, 25, 45)):
        put_after_spikes(own, step, *bounds)
    assert step_folders(own) == ["step_00000020", "step_00000040", "step_00000060"]
    found = scan(own)
    assert list(Keep(1).reasons(found).values()) == ["before a loss spike"] * 2 + ["newest"]
    put_after_spikes(own, 70, 45, 65)
    assert step_folders(own) == ["step_00000040", "step_00000060", "step_00000070"]


def test_a_broken_one_of_the_same_step_is_set_aside_and_not_deleted(own):
    for value in (1.0, 2.0):
        broken = put(own, 4, value=value)
        (broken / "rank_00000.json").unlink()
    put(own, 4, value=3.0)
    assert step_folders(own) == [
        "step_00000004",
        "step_00000004.damaged",
        "step_00000004.damaged-1",
    ]
    assert value_of(find_latest(own)) == 3.0
