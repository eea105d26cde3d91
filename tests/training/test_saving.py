"""Checkpoints of a run: written beside training, failed, damaged."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from attnres_train.checkpoint import saver
from attnres_train.checkpoint.folders import step_name
from attnres_train.checkpoint.manifest import read_manifest
from attnres_train.errors import UserError
from attnres_train.training import trainer
from tests.parity.pool import RankFailedError
from tests.tiny import STEPS, TinyRuns, column, free_port, grid, saved_tensors, train_rank

HALF = STEPS // 2
FAR = STEPS + 2


def train_watched(
    arguments: list[str], port: int, write: Callable[..., None]
) -> tuple[str, list[str]]:
    """Train with ``write(path, ...)`` in place of the function that writes a rank's tensors.
    Returns what is on the screen, or the error, and what is logged."""
    log = logging.getLogger("attnres_train")
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    log.addHandler(handler)
    try:
        with mock.patch.object(saver, "write_tensors", write):
            return train_rank(arguments, port), logged
    except UserError as error:
        return f"{type(error).__name__}: {error}", logged
    finally:
        log.removeHandler(handler)


WRITE = saver.write_tensors


def full_at_step_2(path: Path, *args) -> None:
    if path.parent.name.startswith(step_name(2)) and path.name.startswith("rank_00001"):
        raise OSError(28, "No space left on device", str(path))
    WRITE(path, *args)


def full(path: Path, *args) -> None:
    if torch.distributed.get_rank() == 0 and not path.parent.name.startswith(step_name(1)):
        raise OSError(28, "No space left on device", str(path))
    WRITE(path, *args)


def overtaken(path: Path, *args) -> None:
    """The first save is not written before the step after it is done."""
    if path.parent.name.startswith(step_name(2)):
        metrics = path.parents[2] / "metrics.jsonl"
        waited = threading.Event()
        while len(metrics.read_text().splitlines()) < 3:
            waited.wait(0.02)
    WRITE(path, *args)


def run(tiny: TinyRuns, pool, name: str, write: Callable[..., None], *more: str) -> list:
    every = ["checkpoint.save_interval=2", "checkpoint.keep_last=9", *grid(2, 2)]
    arguments = [str(tiny.path), f"run.name={name}", *every, *more]
    return pool.run(train_watched, 2, arguments, free_port(), write)


def steps_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_step_is_made_while_the_one_before_is_saved(tiny, pool):
    (screen, _), _ = run(tiny, pool, "overtaken", overtaken)
    folder = tiny.folder / "runs" / "overtaken"
    assert [line for line in screen.splitlines() if line.startswith("saved ")] == [
        f"saved {folder / 'checkpoints' / step_name(step)}" for step in (2, 4, 6)
    ]
    whole = tiny.train(
        "every-2",
        "checkpoint.save_interval=2",
        "checkpoint.keep_last=9",
        "checkpoint.async_save=false",
        *grid(2, 2),
        ranks=2,
    )
    assert column(folder, "loss") == column(whole, "loss")
    for step in (2, 4, 6):
        mine, others = saved_tensors(folder, step), saved_tensors(whole, step)
        assert all(torch.equal(tensor, others[name]) for name, tensor in mine.items())


def test_a_save_that_fails_is_told_and_made_at_the_next_interval(tiny, pool):
    (screen, logged), (_, other) = run(tiny, pool, "full-once", full_at_step_2)
    folder = tiny.folder / "runs" / "full-once"
    assert steps_of(folder) == [step_name(4), step_name(6)]
    assert column(folder, "step") == list(range(1, STEPS + 1))
    (line,) = [line for line in logged if "could not be written" in line]
    assert "step 2 " in line and "rank 1 on " in line and "No space left on device" in line
    assert not [line for line in other if "could not be written" in line]
    assert step_name(2) not in screen


def test_a_run_whose_end_cannot_be_saved_ends_in_an_error_on_all_ranks(tiny, pool):
    (error, _), (other, _) = run(tiny, pool, "full-at-the-end", full, "checkpoint.save_interval=1")
    assert error == other
    assert error.startswith(f"SaveFailed: the checkpoint of step {STEPS} could not be written")
    assert "No space left on device" in error
    assert steps_of(tiny.folder / "runs" / "full-at-the-end") == [step_name(1)]
    screen, _ = run(tiny, pool, "full-at-the-end", WRITE)[0]
    assert (
        f"resumed from {tiny.folder / 'runs/full-at-the-end/checkpoints' / step_name(1)}" in screen
    )
    assert column(tiny.folder / "runs" / "full-at-the-end", "step") == list(range(1, STEPS + 1))


def flip_a_byte(folder: Path, step: int) -> Path:
    """Of the last norm's weight."""
    path = folder / "checkpoints" / step_name(step)
    ((_, entry),) = read_manifest(path).tensors["model.norm.weight"].parts
    data = path / entry.file
    content = bytearray(data.read_bytes())
    content[entry.start + 5] ^= 16
    data.write_bytes(content)
    return path


def train_drifting(arguments: list[str], port: int, rank: int, name: str) -> tuple[str, list[str]]:
    """On ``rank``, the parameter that ``name`` ends is another from the second step on."""
    update, steps = trainer.update_router_biases, []

    def update_wrongly(chunks, rate) -> None:
        update(chunks, rate)
        steps.append(rate)
        if torch.distributed.get_rank() == rank and len(steps) == 2:
            next(p for n, p in chunks[0].named_parameters() if n.endswith(name)).data[0] += 1

    with mock.patch.object(trainer, "update_router_biases", update_wrongly):
        return train_watched(arguments, port, WRITE)


def test_replicas_that_drift_apart_are_told_and_saved(tiny, pool):
    arguments = [
        str(tiny.path),
        "run.name=drift",
        "optimizer.sharded=false",  # else an owner's next values would mend it
        "checkpoint.drift_interval=1",
        "log.observers=[]",
    ]
    drift = (free_port(), 1, "layers.3.input_layernorm.weight")
    (_, logged), (_, other) = pool.run(train_drifting, 2, arguments, *drift)
    assert other == []
    first, *rest = [line for line in logged if "replicas of the model differ" in line]
    assert len(rest) == STEPS - 2
    assert (
        first.startswith("after step 2 ")
        and "model.layers.3.input_layernorm.weight on rank 1" in first
    )
    assert steps_of(tiny.folder / "runs" / "drift") == [step_name(HALF), step_name(STEPS)]


def test_an_expert_is_compared_with_those_who_have_it_too(tiny, pool):
    """Ranks 0 and 2 of four hold experts 0 and 1."""
    arguments = [
        str(tiny.path),
        "run.name=expert-drift",
        "optimizer.sharded=false",
        "checkpoint.drift_interval=1",
        "train.train_iters=2",
        "train.micro_batch_size=1",
        "parallel.expert_model_parallel_size=2",
        "log.observers=[]",
    ]
    found = pool.run(train_drifting, 4, arguments, free_port(), 2, "experts.w1")
    (told,) = [line for line in found[0][1] if "replicas of the model differ" in line]
    assert told.startswith("after step 2 ") and told.count(" on rank ") == 1
    assert "block_sparse_moe.experts.0.w1.weight on rank 2." in told


@pytest.fixture
def damaged(tiny, request) -> tuple[str, Path]:
    """A run of its own, whose newest checkpoint has a flipped byte."""
    whole, name = tiny.train("to-be-harmed"), f"harmed-{request.node.name}"
    folder = tiny.folder / "runs" / name
    shutil.copytree(whole, folder)
    return name, flip_a_byte(folder, STEPS)


def test_a_damaged_newest_one_is_named_and_kept_and_the_one_before_used(tiny, damaged):
    name, path = damaged
    screen = tiny.screen(name, f"train.train_iters={FAR}")
    older = path.with_name(step_name(HALF))
    assert f"resumed from {older}\n" in screen
    kept = path.with_name(f"{path.name}.damaged")
    assert f"damaged, kept as {kept}: model.norm.weight in" in screen
    folder = tiny.folder / "runs" / name
    assert column(folder, "step") == list(range(1, FAR + 1))
    assert column(folder, "loss")[:STEPS] == column(tiny.train("to-be-harmed"), "loss")
    assert kept.name in steps_of(folder)
    again = tiny.screen(name, f"train.train_iters={FAR + 1}")
    assert f"resumed from {path.with_name(step_name(FAR))}\n" in again
    assert "damaged, kept" not in again


def test_all_ranks_agree_on_the_one_before(tiny, damaged):
    name, path = damaged
    screen = tiny.screen(name, f"train.train_iters={FAR}", *grid(2, 2), ranks=2)
    assert f"resumed from {path.with_name(step_name(HALF))}\n" in screen


def test_a_file_that_is_gone_from_the_newest_one(tiny, damaged):
    name, path = damaged
    (path / "rank_00000.safetensors").unlink()
    screen = tiny.screen(name, f"train.train_iters={FAR}")
    assert f"resumed from {path.with_name(step_name(HALF))}\n" in screen
    kept = path.with_name(f"{path.name}.damaged")
    assert f"damaged, kept as {kept}: rank_00000.safetensors is missing" in screen


@pytest.mark.parametrize("harm", ["flipped", "gone"])
def test_damage_is_an_error_where_that_is_asked_for(tiny, damaged, harm):
    name, path = damaged
    if harm == "gone":
        (path / "rank_00000.json").unlink()
    before = steps_of(path.parents[1])
    with pytest.raises(RankFailedError) as error:
        tiny.train(name, f"train.train_iters={FAR}", "checkpoint.on_damage=error")
    assert str(path) in str(error.value)
    assert str(path.with_name(step_name(HALF))) in str(error.value)
    assert steps_of(path.parents[1]) == before


@pytest.mark.parametrize("key", ["resume", "load"])
def test_a_damaged_one_that_is_asked_for_is_an_error_that_names_the_one_before(
    tiny, damaged, key, request
):
    (_, path), far = damaged, f"train.train_iters={FAR}"
    with pytest.raises(RankFailedError, match="the one before it is") as error:
        tiny.train(f"from-{request.node.name}", f"checkpoint.{key}={path}", far)
    assert f"{path} is damaged: " in str(error.value)
    assert str(path.with_name(step_name(HALF))) in str(error.value)
    assert path.is_dir()


def test_without_one_before_nothing_starts_over(tiny, damaged):
    name, path = damaged
    shutil.rmtree(path.with_name(step_name(HALF)))
    with pytest.raises(RankFailedError, match="no complete checkpoint in") as error:
        tiny.train(name, f"train.train_iters={FAR}")
    assert "checkpoint.resume=never" in str(error.value)
    assert path.is_dir()
