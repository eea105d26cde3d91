"""Steps whose gradient is not finite: left out alike on every layout, counted, and bounded."""

from __future__ import annotations

import json
import math

import pytest
import torch

from attnres_train.checkpoint.folders import step_name
from attnres_train.checkpoint.manifest import read_manifest
from tests.in_fp64 import run_in_fp64
from tests.parity.pool import RankFailedError
from tests.tiny import SAMPLES, column, grid, records, saved_tensors

PIPELINE = grid(2, 2)
EVERY = ["checkpoint.save_interval=1", "checkpoint.keep_last=9", "train.eval_interval=0"]


def poison(*steps: int, infinite: bool = False) -> str:
    options = f"{{steps: {list(steps)}, infinite: {str(infinite).lower()}}}"
    return f"log.observers=[{{kind: tests.own_observers:Poison, options: {options}}}]"


@pytest.fixture(scope="module")
def skipping(tiny):
    """Step 3 of 5 has a gradient of infinity on one rank."""
    return tiny.train(
        "skipping", *PIPELINE, *EVERY, poison(3, infinite=True), "train.train_iters=5", ranks=2
    )


def test_a_step_is_left_out_whole(skipping):
    before, after = (saved_tensors(skipping, step) for step in (2, 3))
    assert any("e_score_correction_bias" in name for name in before)
    assert any("optimizer" in name for name in before)
    for name, tensor in before.items():
        assert tensor.equal(after[name]), name
    later = saved_tensors(skipping, 4)
    assert any(not tensor.equal(later[name]) for name, tensor in after.items())


def test_its_data_are_passed_over_and_it_is_counted(skipping, tiny):
    progress = [
        read_manifest(skipping / "checkpoints" / step_name(step)).extras["progress"]
        for step in (2, 3, 5)
    ]
    assert [p["samples"] for p in progress] == [SAMPLES * step for step in (2, 3, 5)]
    assert [p["skipped"] for p in progress] == [0, 1, 1]
    assert [r.get("skipped_steps") for r in records(skipping)] == [None, None, 1, 1, 1]
    assert column(skipping, "grad_norm")[2] != column(skipping, "grad_norm")[2], "nan when read"
    lines = (skipping / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[2], parse_constant=pytest.fail)["grad_norm"] is None
    plain = tiny.train("not-skipping", *PIPELINE, *EVERY, "train.train_iters=5", ranks=2)
    assert column(skipping, "loss")[:3] == column(plain, "loss")[:3]
    assert column(skipping, "loss")[3] != column(plain, "loss")[3]


@pytest.mark.parametrize(
    ("name", "layout", "ranks"), [("one", grid(1, 1), 1), ("two", grid(1, 1), 2)]
)
def test_every_layout_leaves_out_the_same_step(tiny, skipping, name, layout, ranks):
    words = [*layout, *EVERY, poison(3, infinite=True), "train.train_iters=5"]
    run = tiny.train(f"skipping-{name}", *words, ranks=ranks)
    assert column(run, "loss") == pytest.approx(column(skipping, "loss"), rel=1e-4)
    assert column(run, "skipped_steps") == column(skipping, "skipped_steps")


def test_two_stages_go_on_as_one_does_after_a_skipped_step(tiny):
    words = [*EVERY, poison(3, infinite=True), "train.train_iters=5"]
    one = run_in_fp64(tiny, "skip-one-fp64", *grid(1, 1), *words)
    two = run_in_fp64(tiny, "skip-two-fp64", *PIPELINE, *words, ranks=2)
    assert column(two, "skipped_steps") == column(one, "skipped_steps") == [1, 1, 1]
    expected, found = saved_tensors(one, 5), saved_tensors(two, 5)
    assert expected.keys() == found.keys()
    assert any(tensor.dtype == torch.float64 for tensor in expected.values())
    for name, tensor in expected.items():
        assert torch.allclose(found[name].double(), tensor.double(), rtol=1e-9, atol=1e-9), name


@pytest.mark.nightly
def test_a_resumed_run_goes_on_counting(tiny, skipping):
    words = [*PIPELINE, *EVERY, poison(3, infinite=True), "train.train_iters=5"]
    tiny.train("skip-resumed", *words, "train.stop_after=3", ranks=2)
    run = tiny.train("skip-resumed", *words, ranks=2)
    for key in ("loss", "skipped_steps"):
        assert column(run, key) == column(skipping, key)


def test_one_too_many_in_a_row_ends_the_run_with_what_led_to_it(tiny):
    words = [*PIPELINE, *EVERY, poison(1, 3, 4, 5), "train.max_skipped_steps=2"]
    with pytest.raises(RankFailedError) as error:
        tiny.train("too-many", *words, ranks=2)
    told = str(error.value)
    assert "the gradient norm of step 5 is nan" in told
    assert "3 such steps in a row; train.max_skipped_steps is 2" in told
    where = (
        "1 of 103 gradients are not finite, in the order of the backward pass: layers.1.mlp_res_no"
    )
    assert where in told
    loss, norm = (
        column(tiny.folder / "runs" / "too-many", key)[1] for key in ("loss", "grad_norm")
    )
    assert f"step 2: loss {loss:.6g}, gradient norm {norm:.6g}" in told
    assert math.isfinite(norm)


def test_none_is_left_out_where_that_is_asked_for(tiny):
    with pytest.raises(RankFailedError, match=r"step 2 is nan, .*the first such step"):
        tiny.train("none-skipped", poison(2), "train.max_skipped_steps=0")
