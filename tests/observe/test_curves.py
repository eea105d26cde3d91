from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from attnres_train.errors import UserError
from attnres_train.observe.curves import TensorBoard, Wandb
from attnres_train.observe.dispatch import Observers
from attnres_train.observe.observer import Observer
from attnres_train.observe.sinks import JsonLines
from tests.observe.helpers import make, record, write

OFFLINE = {"enabled": True, "mode": "offline"}


def test_tensorboard_gets_every_scalar(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(make(TensorBoard, tmp_path), range(1, 4), start=0)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (step, pytest.approx(8.0 / step)) for step in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    ("package", "kind", "key"),
    [
        ("torch.utils.tensorboard", TensorBoard, "log.tensorboard"),
        ("wandb", Wandb, "log.wandb.enabled"),
    ],
)
def test_a_wanted_sink_without_its_package_is_the_users_to_fix(
    tmp_path, monkeypatch, package, kind, key
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=key):
        make(kind, tmp_path)


def test_wandb_offline_writes_into_the_run_folder_and_resumes_its_id(tmp_path):
    write(make(Wandb, tmp_path, wandb=OFFLINE), range(1, 3), start=0)
    first = (tmp_path / "wandb_id").read_text()
    write(make(Wandb, tmp_path, wandb=OFFLINE), range(3, 5), start=2)
    assert (tmp_path / "wandb_id").read_text() == first
    sink = make(Wandb, tmp_path, wandb=OFFLINE)
    sink.on_start(4)
    sink.on_roll_back(3)
    sink.on_end()
    for name in (first, (tmp_path / "wandb_id").read_text()):
        assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{name}"))) >= 1


def test_tensorboard_drops_what_a_roll_back_has_undone(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = make(TensorBoard, tmp_path)
    sink.on_start(0)
    for step in (1, 2, 3):
        sink.on_step_end(record(step))
    sink.on_roll_back(1)
    sink.on_step_end(record(2, loss=9.0))
    sink.on_end()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 8.0), (2, 9.0)]


def test_tensorboard_of_a_run_that_went_back_to_an_older_checkpoint_is_whole(tmp_path):
    """The earlier course is moved aside, with its events; metrics up to then are kept."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(make(JsonLines, tmp_path), range(1, 6), start=0)
    write(make(TensorBoard, tmp_path), range(4, 7), start=3)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


class Curve:
    """A run as Weights & Biases keeps it: a step that is not after the last one is left out."""

    def __init__(self, id: str) -> None:
        self.id, self.summary = id, {}
        self.steps: dict[int, dict] = {}
        self.finished = False

    def log(self, values: dict, step: int) -> None:
        assert not self.finished
        if step > max(self.steps, default=0):
            self.steps[step] = values

    def finish(self) -> None:
        self.finished = True

    def column(self, key: str) -> list[tuple[int, float | None]]:
        return [(step, values.get(key)) for step, values in self.steps.items()]


@pytest.fixture
def curves(monkeypatch) -> dict[str, Curve]:
    """Those of a stand-in for the package, by id."""
    found: dict[str, Curve] = {}

    def init(*, id: str, **settings: Any) -> Curve:
        curve = found.setdefault(id, Curve(id))
        curve.finished, curve.settings = False, settings
        return curve

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return found


def sinks(folder: Path) -> Observers:
    return Observers([make(JsonLines, folder), make(Wandb, folder, wandb=OFFLINE)])


def log(observers: Observers, steps: range, **more) -> None:
    for step in steps:
        for after_save in (False, True):
            observers.tell_step_end(record(step, **more), after_save=after_save)


def test_after_a_roll_back_a_curve_of_its_own_has_every_step_once(tmp_path, curves):
    observers = sinks(tmp_path)
    with observers.watching(0):
        log(observers, range(1, 6))
        observers.tell(Observer.on_roll_back, 3)
        log(observers, range(4, 7), again=1)
    with (resumed := sinks(tmp_path)).watching(6):
        log(resumed, range(7, 9), again=1)
    undone, curve = curves.values()
    assert list(undone.steps) == [1, 2, 3, 4, 5] and undone.summary == {"rolled_back_to": 3}
    assert curve.column("again") == [
        *((step, None) for step in (1, 2, 3)),
        *((step, 1) for step in range(4, 9)),
    ]
    assert curve.column("loss") == [(step, 8.0 / step) for step in range(1, 9)]
    assert curve.settings["name"] == undone.settings["name"]
    assert undone.finished and curve.finished


def test_a_run_that_went_back_to_an_older_checkpoint_has_a_whole_curve(tmp_path, curves):
    """The earlier course is moved aside, with its curve's id; metrics up to then are kept."""
    with (observers := sinks(tmp_path)).watching(0):
        log(observers, range(1, 9))
    (tmp_path / "wandb_id").unlink()
    with (observers := sinks(tmp_path)).watching(5):
        log(observers, range(6, 10), again=1)
    before, after = curves.values()
    assert list(before.steps) == list(range(1, 9))
    assert [step for step, again in after.column("again") if again] == [6, 7, 8, 9]
    assert list(after.steps) == list(range(1, 10))


def test_a_fresh_start_takes_no_step_of_before(tmp_path, curves):
    for again in range(2):
        with (observers := sinks(tmp_path)).watching(0):
            log(observers, range(1, 3 + again))
    assert [list(curve.steps) for curve in curves.values()] == [[1, 2], [1, 2, 3]]
