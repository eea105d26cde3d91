"""A run that stops and resumes is the run that never stopped."""

from __future__ import annotations

import re

import pytest
import torch

from tests.parity.pool import RankFailedError
from tests.tiny import STEPS, column, grid, records, saved_tensors

HALF = STEPS // 2
STOP = f"train.stop_after={HALF}"
GRIDS = [(1, 1), (2, 2)]


@pytest.mark.parametrize(("stages", "virtual"), GRIDS)
def test_two_halves_equal_the_whole_bit_for_bit(tiny, stages, virtual):
    layout, ranks = grid(stages, virtual), stages
    whole = tiny.train(f"whole-{stages}x{virtual}", *layout, ranks=ranks)
    name = f"halves-{stages}x{virtual}"
    tiny.train(name, *layout, STOP, ranks=ranks)
    halves = tiny.train(name, *layout, ranks=ranks)

    assert column(halves, "step") == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "validation_loss", "lr", "tokens"):
        assert column(halves, key) == column(whole, key), key

    middle, end, expected = (
        saved_tensors(run, step) for run, step in ((whole, HALF), (whole, STEPS), (halves, STEPS))
    )
    assert end.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, end[name]), name
    moved = [name for name, tensor in end.items() if not torch.equal(tensor, middle[name])]
    for part in (
        "mlp.",
        "gate.e_score_correction_bias",
        "optimizer.momentum_buffer.model.layers.0",
    ):
        assert any(part in name for name in moved), f"{part} stood still: nothing was compared"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, 2, 1), (1, 1, 1)),
        ((1, 1, 1), (2, 2, 1)),
        pytest.param((1, 1, 1), (1, 1, 2), marks=pytest.mark.nightly),
        ((1, 1, 2), (2, 1, 1)),
    ],
    ids=lambda place: "P{}xV{}xDP{}".format(*place),
)
def test_another_layout_takes_a_checkpoint_over(tiny, before, after):
    """(P, V, data-parallel replicas) before and after; only the order of sums may differ."""
    whole = tiny.train("whole-1x1", *grid(1, 1))
    (p, v, dp), first = before, "first-{}x{}x{}".format(*before)
    half = tiny.train(first, *grid(p, v), STOP, ranks=p * dp)
    (p, v, dp), second = after, "{}-{}x{}x{}".format(first, *after)
    resumed = tiny.train(
        second, *grid(p, v), f"checkpoint.resume={half}", "checkpoint.keep_last=1", ranks=p * dp
    )

    assert column(half, "step") == list(range(1, HALF + 1))
    assert column(resumed, "step") == list(range(HALF + 1, STEPS + 1))
    assert column(resumed, "loss") == pytest.approx(column(whole, "loss")[HALF:], rel=1e-5)
    assert column(resumed, "grad_norm") == pytest.approx(
        column(whole, "grad_norm")[HALF:], rel=1e-4
    )
    assert [path.name for path in (half / "checkpoints").iterdir()] == [f"step_{HALF:08d}"]
    assert [path.name for path in (resumed / "checkpoints").iterdir()] == [f"step_{STEPS:08d}"]


def test_resuming_tells_from_where_and_a_finished_run_is_left_alone(tiny):
    tiny.train("twice", STOP)
    screen = tiny.screen("twice")
    assert re.search(rf"resumed from \S+/twice/checkpoints/step_{HALF:08d}\n", screen)
    assert f"step {HALF}/{STEPS}" not in screen
    assert f"step {STEPS}/{STEPS}" in screen

    run = tiny.train("twice")
    before = records(run), sorted((run / "checkpoints").iterdir())
    again = tiny.screen("twice", "log.progress=off")
    assert f"step {STEPS}/{STEPS}" not in again
    assert (records(run), sorted((run / "checkpoints").iterdir())) == before


def test_never_starts_over(tiny):
    tiny.train("over", "run.seed=1", STOP)
    run = tiny.train("over", "checkpoint.resume=never", STOP)
    assert column(run, "step") == list(range(1, HALF + 1))
    whole = tiny.train("whole-1x1", *grid(1, 1))
    assert column(run, "loss") == column(whole, "loss")[:HALF]


def test_a_checkpoint_of_another_model_is_refused_and_its_run_left_alone(tiny):
    run = tiny.train("kept", STOP)
    before = (run / "config.yaml").read_text(), records(run)
    with pytest.raises(RankFailedError, match="is of another model than this"):
        tiny.train("kept", "model.moe.intermediate_size=24")
    assert ((run / "config.yaml").read_text(), records(run)) == before
