"""What a record says of the run so far goes on where a run resumes or goes back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import pytest

from attnres_train.observe.course import HALF_LIFE_STEPS, Course, Smoothed
from attnres_train.observe.dispatch import Observers
from attnres_train.observe.observer import Observer
from attnres_train.observe.sinks import JsonLines, read_records
from tests.observe.helpers import make, record

LOSSES = [4.0, 3.0, math.nan, 2.5, 2.0, 2.25]


def weighted(losses: list[float]) -> float:
    """The mean of finite ``losses``, each with half the weight of the one a half-life later."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    weights = [0.5 ** ((len(finite) - i) / HALF_LIFE_STEPS) for i in range(len(finite))]
    return sum(w * x for w, x in zip(weights, finite, strict=True)) / sum(weights)


def run(folder: Path, steps: Iterable[int], start: int) -> None:
    folder.mkdir(exist_ok=True)
    observers = Observers([make(Course, folder), make(JsonLines, folder)])
    observers.tell(Observer.on_start, start)
    for step in steps:
        observers.tell(Observer.on_step_begin, step)
        observers.tell_step_end(record(step, loss=LOSSES[step - 1], tflops=2e-9), after_save=False)
    observers.tell(Observer.on_end)


def test_smoothed_loss_is_a_weighted_mean_of_what_is_finite(tmp_path):
    run(tmp_path, range(1, 7), 0)
    found = [r["smoothed_loss"] for r in read_records(tmp_path / "metrics.jsonl")]
    assert found == pytest.approx([weighted(LOSSES[:n]) for n in range(1, 7)], rel=1e-12)
    assert found[0] == 4.0
    assert math.isnan(Smoothed().add(math.inf))


def test_a_run_that_resumes_equals_one_that_did_not(tmp_path):
    run(tmp_path / "whole", range(1, 7), 0)
    run(tmp_path / "parts", range(1, 6), 0)
    run(tmp_path / "parts", range(4, 7), 3)  # steps 4 and 5 come again
    whole, parts = (read_records(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    for key in ("step", "smoothed_loss", "flops"):
        assert [r[key] for r in parts] == [r[key] for r in whole]
    assert whole[-1]["flops"] == pytest.approx(6 * 2e3 * 0.1)
    seconds = [r["wall_seconds"] for r in parts]
    assert seconds == sorted(seconds) and seconds[0] >= 0
    times = [r["time"] for r in parts]
    assert times == sorted(times) and times[0] > 1.6e9


def test_after_a_roll_back_the_loss_forgets_and_time_does_not(tmp_path):
    observers = Observers([make(Course, tmp_path), make(JsonLines, tmp_path)])
    observers.tell(Observer.on_start, 0)
    for step in (1, 2, 3, 4):
        observers.tell(Observer.on_step_begin, step)
        observers.tell_step_end(record(step, loss=LOSSES[step - 1]), after_save=False)
    spent = read_records(tmp_path / "metrics.jsonl")[-1]["wall_seconds"]
    observers.tell(Observer.on_roll_back, 2)
    observers.tell_step_end(record(3, loss=1.0), after_save=False)
    last = read_records(tmp_path / "metrics.jsonl")[-1]
    assert last["smoothed_loss"] == pytest.approx(weighted([4.0, 3.0, 1.0]), rel=1e-12)
    assert last["wall_seconds"] > spent


def test_records_of_before_have_no_such_keys(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 4.0, "step_seconds": 2.5}\n'
        '{"step": 2, "loss": 3.0, "step_seconds": 2.5}\n'
    )
    run(tmp_path, [3, 4], 2)
    third = read_records(tmp_path / "metrics.jsonl")[2]
    assert third["wall_seconds"] >= 5.0
    assert third["smoothed_loss"] == pytest.approx(weighted([4.0, 3.0]), rel=1e-12)


def test_a_name_of_the_users_stays_the_users(tmp_path):
    course = make(Course, tmp_path)
    course.on_start(0)
    course.on_step_begin(1)
    mine = record(1, time=7.0)
    course.on_step_end(mine)
    assert mine["time"] == 7.0 and "smoothed_loss" in mine
