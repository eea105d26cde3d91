"""A trace of the steps, on the ranks, that are asked for."""

from __future__ import annotations

import gzip
import json

import pytest

from attnres_train.config.observe_schema import ProfileConfig
from attnres_train.errors import UserError
from attnres_train.observe.profile import Profiler
from tests.observe.helpers import context, record


def profiler(folder, **profile) -> Profiler:
    run = context(folder)
    return Profiler(ProfileConfig(**profile), "observe.profile", run)


def steps(observer: Profiler, *numbers: int) -> None:
    import torch

    for step in numbers:
        observer.on_step_begin(step)
        torch.ones(3) @ torch.ones(3)
        observer.on_step_end(record(step))


def test_a_chrome_trace_of_the_steps(tmp_path, capsys):
    observer = profiler(tmp_path, steps=[2, 3])
    observer.on_start(0)
    steps(observer, 1, 2, 3, 4, 5)
    observer.on_end()
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "rank_0_steps_2_3.json.gz" and str(path) in capsys.readouterr().out
    with gzip.open(path) as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("aten::dot") == 2


def test_a_run_that_ends_before_keeps_what_there_is(tmp_path):
    observer = profiler(tmp_path, steps=[2, 9])
    observer.on_start(0)
    steps(observer, 1, 2)
    observer.on_end()
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank_0_steps_2_2.json.gz"]


def test_nothing_is_profiled_after_the_steps(tmp_path):
    observer = profiler(tmp_path, steps=[2, 3])
    observer.on_start(5)
    steps(observer, 6)
    observer.on_end()
    assert not (tmp_path / "profile").exists()


def test_ranks_that_are_asked_for(tiny):
    run = tiny.train(
        "profiled",
        "train.train_iters=2",
        "observe.profile.steps=[1,1]",
        "observe.profile.ranks=[1]",
        "parallel.pipeline_model_parallel_size=2",
        ranks=2,
    )
    assert [path.name for path in (run / "profile").iterdir()] == ["rank_1_steps_1_1.json.gz"]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("observe.profile.steps=[3,2]", "observe.profile.steps"),
        ("observe.profile.steps=[0,2]", "observe.profile.steps"),
        ("observe.profile.steps=[3]", "observe.profile.steps"),
        ("observe.profile.ranks=[-1]", "observe.profile.ranks"),
        ("observe.interval=-1", "observe.interval"),
        ("observe.keep=1", "observe.keep"),
    ],
)
def test_what_is_the_users_to_mend(tiny, override, key):
    with pytest.raises(UserError, match=key):
        tiny.config(override)
