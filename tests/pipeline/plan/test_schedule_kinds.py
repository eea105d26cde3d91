from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnres_train.config import ConfigError, RunConfig, check_config, load_config
from attnres_train.config.kinds import kind_of
from attnres_train.config.schema import PipelineConfig
from attnres_train.errors import UserError
from attnres_train.pipeline.plan.schedule import gpipe, one_f_one_b
from attnres_train.pipeline.plan.schedule_kinds import OneFOneB, PipelineSchedule, to_compare
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.pipeline.plan.validate import validate
from tests.config.conftest import SMALL
from tests.config.helpers import write
from tests.own_schedules import LongWarmUp, OneAtATime
from tests.pipeline.plan.layouts import layouts

OWN = "tests.own_schedules:"


def make(name: str, **options) -> PipelineSchedule:
    section = PipelineConfig(schedule=name, schedule_options=options)
    return to_compare(section)[name]


@pytest.mark.parametrize(("name", "listed"), [("1f1b", one_f_one_b), ("gpipe", gpipe)])
def test_ours_are_the_functions(name, listed):
    for shape in ((2, 1, 3), (3, 2, 7), (1, 1, 1)):
        assert make(name).schedule(*shape) == listed(*shape)


def test_to_compare_is_ours_and_the_runs_own():
    section = PipelineConfig(schedule=f"{OWN}LongWarmUp", schedule_options={"extra": 4})
    kinds = to_compare(section)
    assert list(kinds) == ["1f1b", "gpipe", f"{OWN}LongWarmUp"]
    assert type(kinds["1f1b"]) is OneFOneB
    own = kinds[f"{OWN}LongWarmUp"]
    assert isinstance(own, LongWarmUp) and own.options.extra == 4
    assert own.about() == "1F1B that runs further ahead before its first backward pass."
    assert list(to_compare(PipelineConfig(schedule="gpipe"))) == ["1f1b", "gpipe"]


@given(layouts(), st.integers(1, 9), st.sampled_from([OneAtATime, LongWarmUp]), st.integers(0, 5))
def test_those_of_the_users_are_proved_like_ours(layout, micro_batches, kind, extra):
    options = {"extra": extra} if kind is LongWarmUp else {}
    schedule = make(f"{OWN}{kind.__name__}", **options).schedule(
        layout.num_ranks, layout.num_virtual_stages, micro_batches
    )
    report = validate(TransportPlan(layout), schedule)
    assert max(report.peak_blocks) <= micro_batches * layout.blocks.num_blocks


@pytest.mark.parametrize("extra", [0, 1, 3])
def test_the_warm_up_is_as_long_as_the_class_says(extra):
    shape = (4, 2, 8)
    for rank, actions in enumerate(make(f"{OWN}LongWarmUp", extra=extra).schedule(*shape)):
        ahead = next(i for i, action in enumerate(actions) if action.kind == "B")
        assert ahead == 2 * (4 - rank - 1) + 4 + extra + 1


def test_a_warm_up_ends_where_the_passes_do():
    far = make(f"{OWN}LongWarmUp", extra=100)
    assert far.schedule(3, 1, 4) == gpipe(3, 1, 4)
    assert one_f_one_b(2, 1, 3, lambda *_: -1) == one_f_one_b(2, 1, 3, lambda *_: 0)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("WithoutTheLast", "F(chunk 0, micro-batch 3) is never run"),
        ("WithoutBackward", "B(chunk 0, micro-batch 3) is never run"),
        ("OfTuples", "rank 0: ('F', 0, 0) is no Action of F or B, chunk 0 to 3 and micro"),
        (
            "BeyondTheModel",
            "rank 0: F(chunk 4, micro-batch 0) is no Action of F or B, chunk 0",
        ),
    ],
)
def test_what_cannot_be_proved_is_refused_and_named(name, told):
    kind = make(OWN + name)
    with pytest.raises(UserError) as caught, kind.faults_named():
        kind.schedule(2, 2, 4)
    assert str(caught.value).startswith(f"pipeline.schedule {OWN}{name} cannot be run: {told}")


class TestConfiguration:
    @pytest.fixture
    def load(self, tmp_path):
        path = write(tmp_path, "small.yaml", SMALL)

        def load(*overrides: str) -> RunConfig:
            config = load_config(path, [f"pipeline.{override}" for override in overrides])
            check_config(config)
            return config

        return load

    def test_options(self, load):
        config = load(f"schedule={OWN}LongWarmUp", "schedule_options.extra=2")
        assert kind_of(config, "pipeline.schedule").options.extra == 2
        assert kind_of(load(f"schedule={OWN}LongWarmUp"), "pipeline.schedule").options.extra == 1

    @pytest.mark.parametrize(
        ("overrides", "told"),
        [
            (
                [f"schedule={OWN}LongWarmUp", "schedule_options.extras=2"],
                "pipeline.schedule_options.extras (command line): unknown key; ",
            ),
            (
                ["schedule=gpipe", "schedule_options.extra=2"],
                "pipeline.schedule_options.extra (command line): unknown key; ",
            ),
            (
                [f"schedule={OWN}InverseSquareRoot"],
                f'pipeline.schedule (command line) is "{OWN}InverseSquareRoot": '
                f"{OWN}InverseSquareRoot is no PipelineSchedule: derive the class from ",
            ),
            (["schedule=2f2b"], "pipeline.schedule (command line): expected one of 1f1b, gpipe"),
        ],
    )
    def test_wrong_ones(self, load, overrides, told):
        with pytest.raises(ConfigError) as caught:
            load(*overrides)
        assert str(caught.value).startswith(told)
