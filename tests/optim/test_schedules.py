from __future__ import annotations

import math

import pytest

from attnres_train.config import ConfigError, check_config, describe, load_config, save_config
from attnres_train.config.kinds import CHOICES, kind_of, resolve
from attnres_train.config.schema import LRScheduleConfig, RunConfig
from attnres_train.errors import UserError
from attnres_train.optim.schedules import LRSchedule
from tests.config.conftest import SMALL
from tests.config.helpers import write

KINDS = list(CHOICES["lr_schedule.kind"].built_in)


def make(**section) -> LRSchedule:
    config = LRScheduleConfig(**section)
    return resolve("lr_schedule.kind", config.kind)(config, "lr_schedule")


def lr(step: int, train_iters: int = 100, **section) -> float:
    return make(**section).learning_rate(step, peak=2.0, train_iters=train_iters)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(1, 0.2), (5, 1.0), (10, 2.0), (55, 1.1), (100, 0.2), (150, 0.2)],
)
def test_cosine(step, expected):
    assert lr(step, kind="cosine", warmup_iters=10, min_lr_ratio=0.1) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(20, 1.5), (30, 1.0), (60, 0.0), (90, 0.0)])
def test_cosine_ends_at_decay_end_iter(step, expected):
    rate = lr(step, kind="cosine", decay_end_iter=60, min_lr_ratio=0.0)
    assert rate == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("step", "expected"), [(2, 1.0), (4, 2.0), (80, 2.0), (90, 1.0), (95, 0.5), (100, 0.0)]
)
def test_wsd_decays_over_the_last_fifth(step, expected):
    assert lr(step, kind="wsd", warmup_iters=4, min_lr_ratio=0.0) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(60, 2.0), (80, 1.2), (100, 0.4)])
def test_wsd_with_its_own_length(step, expected):
    schedule = {"kind": "wsd", "wsd_decay_iters": 40, "min_lr_ratio": 0.2}
    assert lr(step, **schedule) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(1, 0.5), (4, 2.0), (5, 2.0), (1000, 2.0)])
def test_constant(step, expected):
    assert lr(step, kind="constant", warmup_iters=4) == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cosine", (0.003997186267065174, 0.0026978971289703304, 0.0014912423649249772)),
        ("wsd", (0.004, 0.004, 0.001984)),
        ("constant", (0.004, 0.004, 0.004)),
    ],
)
def test_to_the_last_digit(kind, expected):
    """A run that resumes goes on with the learning rates that it began with."""
    schedule = make(kind=kind, warmup_iters=3, min_lr_ratio=0.37)
    assert tuple(schedule.learning_rate(step, 4e-3, 50) for step in (4, 27, 48)) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("warmup", "iters"), [(0, 1), (1, 1), (3, 2), (5, 5), (9, 10)])
def test_short_runs_stay_between_zero_and_the_peak(kind, warmup, iters):
    rates = [lr(s, iters, kind=kind, warmup_iters=warmup) for s in range(1, iters + 1)]
    assert all(0 < rate <= 2.0 for rate in rates)


@pytest.mark.parametrize("kind", KINDS)
def test_updates_are_counted_from_one(kind):
    with pytest.raises(ValueError, match="counted from 1"):
        lr(0, kind=kind)


OWN = "tests.own_schedules:"
NAME = f"{OWN}InverseSquareRoot"


class TestOfTheUsers:
    """A schedule in a file outside the package, as a user would write it."""

    @pytest.fixture
    def load(self, tmp_path):
        small_file = write(tmp_path, "small.yaml", SMALL)

        def load(name: str, *overrides: str) -> RunConfig:
            config = load_config(small_file, [f"lr_schedule.kind={name}", *overrides])
            check_config(config)
            return config

        return load

    def test_values(self, load):
        config = load(NAME, "lr_schedule.warmup_iters=4", "lr_schedule.options.timescale=8")
        schedule = kind_of(config, "lr_schedule.kind")
        rates = [schedule.learning_rate(step, 2.0, 100) for step in (1, 4, 12, 28)]
        assert rates == [0.5, 2.0, 2 / math.sqrt(2), 1.0]

    def test_summary(self, load):
        text = describe(load(NAME, "lr_schedule.options.timescale=25", "optimizer.lr=1e-2"), [4])
        assert text.splitlines()[-1].endswith(f"0.01 from step 1, {NAME} to 0.00447214 at step 100")

    def test_what_it_is(self, load):
        about = kind_of(load(NAME), "lr_schedule.kind").about()
        assert about == "The peak over the square root of the time since the warm-up."

    def test_saved_with_its_options(self, load, tmp_path):
        config = load(NAME, "lr_schedule.options.timescale=25")
        save_config(config, tmp_path / "saved.yaml")
        again = load_config(tmp_path / "saved.yaml")
        assert again == config
        assert kind_of(again, "lr_schedule.kind").options.timescale == 25

    @pytest.mark.parametrize(
        ("override", "told"),
        [
            (
                "lr_schedule.options.timscale=3",
                "lr_schedule.options.timscale (command line): unknown key; did you mean "
                "lr_schedule.options.timescale?",
            ),
            ("lr_schedule.options.timescale=0", "expected an integer of at least 1, not 0"),
            ("lr_schedule.wsd_decay_iters=3", f"wsd_decay_iters is not read with kind {NAME}"),
        ],
    )
    def test_wrong_options(self, load, override, told):
        with pytest.raises(ConfigError) as caught:
            load(NAME, override)
        assert told in str(caught.value)

    def test_rates_that_no_run_can_use(self, load):
        with pytest.raises(ConfigError, match=r"schedules:Diverging gives a .* of inf at step 100"):
            load(f"{OWN}Diverging")
        config = load(f"{OWN}Diverging", "lr_schedule.warmup_iters=100")
        schedule = kind_of(config, "lr_schedule.kind")
        with pytest.raises(UserError, match="must be finite and at least 0"):
            schedule.learning_rate(101, 1.0, 101)

    @pytest.mark.parametrize(
        ("name", "told"),
        [
            ("Incomplete", "is not complete: it has no after_warmup"),
            ("NoSchedule", "derive the class from attnres_train.extend.LRSchedule"),
            ("InverseSqareRoot", f"did you mean {NAME}?"),
        ],
    )
    def test_classes_that_are_no_schedule(self, load, name, told):
        with pytest.raises(ConfigError) as caught:
            load(OWN + name)
        assert f'lr_schedule.kind (command line) is "{OWN}{name}": ' in str(caught.value)
        assert told in str(caught.value)
