"""A run that goes back to before a loss spike, and goes on with the data after it."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from attnres_train.__main__ import main
from attnres_train.checkpoint.folders import step_name
from attnres_train.checkpoint.manifest import read_manifest
from attnres_train.training import building
from tests.in_fp64 import run_in_fp64, train_in_fp64
from tests.parity.pool import RankFailedError
from tests.tiny import SAMPLES, TOKENS, column, free_port, grid, saved_tensors

STEPS = 12
WINDOW = 4
EVERY = [
    f"train.train_iters={STEPS}",
    f"train.spike_window={WINDOW}",
    "train.eval_interval=0",
    "train.on_spike=roll_back",
    "optimizer.lr=1e-4",
    "checkpoint.save_interval=2",
    "checkpoint.keep_last=9",
]


def hurt(*times: int, **more) -> str:
    """The loss spikes at the step after each of ``times``."""
    options = json.dumps({"times": times, **more})
    return f"log.observers=[{{kind: tests.own_observers:Hurt, options: {options}}}]"


def progress_of(run: Path, step: int) -> dict:
    return read_manifest(run / "checkpoints" / step_name(step)).extras["progress"]


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def one(tiny):
    """Step 7 hurts, step 8 spikes: back to 6."""
    return run_in_fp64(tiny, "back-one", *grid(1, 1), *EVERY, hurt(7))


@pytest.fixture(scope="module")
def piped(tiny):
    return run_in_fp64(tiny, "back-two", *grid(2, 2), *EVERY, hurt(7), ranks=2)


def test_the_run_goes_back_and_passes_over_the_data(one):
    told = f"rolled back from step 8 to {one / 'checkpoints' / step_name(6)} (roll-back 1); "
    assert f"{told}the data go on at sample {8 * SAMPLES}" in (one / "screen").read_text()
    assert column(one, "step") == list(range(1, STEPS + 1))
    assert column(one, "tokens") == [TOKENS * step for step in range(1, STEPS + 1)]
    assert column(one, "loss_spikes") == [1] * (STEPS - 6)
    end = progress_of(one, STEPS)
    assert (end["step"], end["samples"], end["spikes"]["roll_backs"]) == (
        STEPS,
        SAMPLES * (STEPS + 2),
        1,
    )
    assert max(column(one, "loss")) < 6


def test_what_was_undone_is_kept_beside(one):
    (entry,) = lines_of(one / "history" / "roll_backs.jsonl")
    assert entry["from_step"] == 8 and entry["to_step"] == 6 and entry["samples"] == 8 * SAMPLES
    undone = lines_of(one / "history" / "abandoned.jsonl")
    assert [record["step"] for record in undone] == [7, 8]
    assert undone[1]["loss"] == entry["loss"] > max(column(one, "loss")) + 1
    assert undone[1]["loss_spikes"] == 1


def assert_as_told_where(tiny, run: Path, *words: str, ranks: int = 1) -> None:
    """Learnt in ``run`` is what a run learns that began at the checkpoint, its place in the data
    that of after the spike."""
    path, name = run / "checkpoints" / step_name(6), f"{run.name}-told-where"
    again = tiny.folder / "runs" / name
    arguments = [str(tiny.path), f"run.name={name}", f"checkpoint.resume={path}", *words, *EVERY]
    tiny.pool.run(train_from_after_step_8, ranks, arguments, free_port())
    assert column(again, "loss")[-(STEPS - 6) :] == column(run, "loss")[6:]
    expected = saved_tensors(again, STEPS)
    for name, tensor in saved_tensors(run, STEPS).items():
        assert torch.equal(tensor, expected[name]), name


def test_nothing_is_left_of_the_spike(tiny, one):
    assert_as_told_where(tiny, one)


@pytest.mark.nightly
def test_ranks_that_share_experts_go_back_and_nothing_is_left(tiny, one):
    words = [*grid(1, 1), "parallel.expert_model_parallel_size=2"]
    run = run_in_fp64(tiny, "back-experts", *words, *EVERY, hurt(7), ranks=2)
    assert_equal_but_for_rounding(run, one)
    assert_as_told_where(tiny, run, *words, ranks=2)


def train_from_after_step_8(arguments: list[str], port: int) -> str:
    position = building.Checkpoints._position

    def moved(self, found):
        progress = position(self, found)
        progress.samples = 8 * SAMPLES
        return progress

    with mock.patch.object(building.Checkpoints, "_position", moved):
        return train_in_fp64(arguments, port)


def assert_equal_but_for_rounding(run: Path, expected: Path) -> None:
    assert column(run, "loss") == pytest.approx(column(expected, "loss"), rel=1e-9)
    tensors, found = saved_tensors(expected, STEPS), saved_tensors(run, STEPS)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.allclose(found[name].double(), tensor.double(), rtol=1e-9, atol=1e-9), name


@pytest.mark.nightly
def test_two_stages_go_back_as_one_does(one, piped):
    assert_equal_but_for_rounding(piped, one)


def test_replicas_with_a_sharded_optimizer_go_back_as_one_does(tiny, one):
    words = [*grid(1, 1), *EVERY, hurt(7), "optimizer.sharded=true"]
    assert_equal_but_for_rounding(run_in_fp64(tiny, "back-sharded", *words, ranks=2), one)


@pytest.mark.parametrize(
    ("stop", "later"), [(6, hurt(7)), pytest.param(10, hurt(), marks=pytest.mark.nightly)]
)
def test_a_resume_across_it_is_bitwise(tiny, piped, stop, later):
    """Before the spike, and after the roll-back."""
    words, name = [*grid(2, 2), *EVERY], f"back-resumed-{stop}"
    run_in_fp64(tiny, name, *words, hurt(7), f"train.stop_after={stop}", ranks=2)
    assert_same(run_in_fp64(tiny, name, *words, later, ranks=2), piped)


@pytest.mark.nightly
def test_a_run_that_ends_before_its_next_save_goes_back_again(tiny, piped):
    words, name = [*grid(2, 2), *EVERY], "back-crashed"
    with pytest.raises(RankFailedError, match="crashed as it was told to"):
        run_in_fp64(tiny, name, *words, hurt(7, crash=True), ranks=2)
    run = run_in_fp64(tiny, name, *words, hurt(7), ranks=2)
    assert_same(run, piped)
    assert len(lines_of(run / "history" / "roll_backs.jsonl")) == 1


def assert_same(run: Path, expected: Path) -> None:
    for key in ("step", "loss", "grad_norm", "loss_spikes"):
        assert column(run, key) == column(expected, key), key
    assert progress_of(run, STEPS) == progress_of(expected, STEPS)
    tensors = saved_tensors(expected, STEPS)
    for key, tensor in saved_tensors(run, STEPS).items():
        assert torch.equal(tensor, tensors[key]), key


@pytest.mark.nightly
def test_a_checkpoint_that_spikes_again_is_passed_over(tiny):
    """That of step 7 holds the weights that were hurt in it."""
    words, name = [*grid(1, 1), *EVERY], "back-further"
    run_in_fp64(tiny, name, *words, hurt(7), "train.stop_after=7")
    run = run_in_fp64(tiny, name, *words, hurt())
    entries = lines_of(run / "history" / "roll_backs.jsonl")
    assert [entry["to_step"] for entry in entries] == [7, 6]
    assert column(run, "step") == list(range(1, STEPS + 1))
    assert max(column(run, "loss")) < 6


@pytest.mark.nightly
def test_a_damaged_checkpoint_is_passed_over(tiny):
    run = run_in_fp64(tiny, "back-damaged", *grid(2, 2), *EVERY, hurt(7, damage=6), ranks=2)
    (entry,) = lines_of(run / "history" / "roll_backs.jsonl")
    assert entry["to_step"] == 4
    assert (run / "checkpoints" / f"{step_name(6)}.damaged").is_dir()
    assert column(run, "step") == list(range(1, STEPS + 1))


def test_without_a_checkpoint_the_run_goes_on(tiny):
    words = [*grid(1, 1), *EVERY, hurt(7), "checkpoint.save_interval=0"]
    run = run_in_fp64(tiny, "back-to-nothing", *words)
    assert column(run, "step") == list(range(1, STEPS + 1))
    assert column(run, "loss")[7] > 6
    assert not (run / "history" / "roll_backs.jsonl").exists()


def test_told_alone_it_is_counted_and_a_checkpoint_from_before_kept(tiny, capsys):
    told = ["train.on_spike=tell", "checkpoint.keep_last=1"]
    run = run_in_fp64(tiny, "told-alone", *grid(2, 1), *EVERY, hurt(7), *told, ranks=2)
    assert column(run, "loss_spikes") == [1] * (STEPS - 7)
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        step_name(6),
        step_name(STEPS),
    ]
    told = (run / "screen").read_text()
    assert "the loss of step 8 spikes: " in told and "(spike 1 of the run)" in told
    assert "the spike of step 8 stands out no more" in told
    assert main(["checkpoint", "ls", str(run)]) == 0
    first, last = capsys.readouterr().out.splitlines()[1:]
    assert first.startswith(step_name(6)) and first.endswith("before a loss spike")
    assert last.startswith(step_name(STEPS)) and last.endswith("newest")


@pytest.mark.nightly
def test_a_blend_is_long_enough_and_the_last_step_may_spike(tiny):
    """The run takes more samples than its steps ask for."""
    corpus = f"{{kind: text, path: {tiny.folder / 'corpus'}, weight: %s}}"
    words = [f"data.corpus=[{corpus % 1}, {corpus % 2}]", "train.train_iters=8"]
    run = run_in_fp64(tiny, "back-blended", *grid(1, 1), *EVERY, *words, hurt(7))
    assert column(run, "step") == list(range(1, 9))
    assert progress_of(run, 8)["samples"] == SAMPLES * (8 + 2)


@pytest.mark.nightly
def test_one_too_many_ends_the_run(tiny):
    words = [*grid(1, 1), *EVERY, hurt(7, 9), "train.max_roll_backs=1"]
    with pytest.raises(RankFailedError, match=r"train\.max_roll_backs=1 roll-backs have been made"):
        run_in_fp64(tiny, "back-too-often", *words)
    assert len(lines_of(tiny.folder / "runs/back-too-often/history/roll_backs.jsonl")) == 1
