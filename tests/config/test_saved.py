"""Configurations of before: keys that are no more, in a user's file and in what a program saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from attnres_train.config import ConfigError, check_config, load_config, save_config
from attnres_train.config.renamed import RENAMED
from attnres_train.config.saved import load_saved, saved_config
from tests.config.conftest import SMALL
from tests.config.helpers import error_of, write

BEFORE = Path(__file__).with_name("saved_before.yaml").read_text(encoding="utf-8")


def before(kind: str, decay: int | None) -> str:
    """A run folder's ``config.yaml`` of before, with another schedule."""
    shown = "null" if decay is None else str(decay)
    text = BEFORE.replace("kind: wsd", f"kind: {kind}")
    return text.replace("decay_iters: 60", f"decay_iters: {shown}")


@pytest.mark.parametrize(
    ("kind", "decay", "meant"),
    [
        ("cosine", 60, (60, None)),
        ("wsd", 60, (None, 60)),
        ("constant", 60, (None, None)),
        ("cosine", None, (None, None)),
        ("wsd", None, (None, None)),
    ],
)
def test_what_was_saved_before_is_read_as_it_was_meant(tmp_path, kind, decay, meant):
    path = write(tmp_path, "config.yaml", before(kind, decay))
    values = yaml.safe_load(before(kind, decay))
    for config in (load_saved(path), saved_config(values, "meta.json")):
        check_config(config)
        schedule = config.lr_schedule
        assert (schedule.decay_end_iter, schedule.wsd_decay_iters) == meant
        assert (schedule.kind, schedule.warmup_iters) == (kind, 10)
    assert values == yaml.safe_load(before(kind, decay))


def test_what_is_saved_now_is_read_as_it_is(tmp_path, small_file):
    config = load_config(small_file, ["lr_schedule.kind=wsd", "lr_schedule.wsd_decay_iters=7"])
    save_config(config, tmp_path / "config.yaml")
    assert load_saved(tmp_path / "config.yaml") == config
    assert saved_config(config.model_dump(mode="json"), "meta.json") == config


def test_overrides_are_in_the_words_of_now(tmp_path):
    path = write(tmp_path, "config.yaml", before("cosine", 60))
    config = load_saved(path, ["lr_schedule.decay_end_iter=70", "train.train_iters=7"])
    assert (config.lr_schedule.decay_end_iter, config.train.train_iters) == (70, 7)
    with pytest.raises(ConfigError, match=r"decay_iters \(command line\): it meant two things"):
        load_saved(path, ["lr_schedule.decay_iters=70"])


class TestInAUsersFile:
    def test_the_old_key_says_what_to_write(self, tmp_path):
        path = write(tmp_path, "mine.yaml", SMALL + "lr_schedule:\n  decay_iters: 60\n")
        message, key = error_of(path), "lr_schedule.decay_iters"
        assert message.startswith(f"{key} ({path}:10): it meant two things; write lr_schedule.dec")
        assert "lr_schedule.decay_end_iter with kind cosine" in message
        assert "lr_schedule.wsd_decay_iters with kind wsd" in message

    def test_what_was_saved_trains_as_it_is_where_nothing_was_set(self, tmp_path):
        config = load_config(write(tmp_path, "config.yaml", before("wsd", None)))
        assert config == load_saved(tmp_path / "config.yaml")
        told = r"decay_iters \(.*/set.yaml:86\): it meant two things"
        with pytest.raises(ConfigError, match=told):
            load_config(write(tmp_path, "set.yaml", before("wsd", 60)))

    def test_null_changes_nothing(self, tmp_path, small):
        path = write(tmp_path, "config.yaml", SMALL + "lr_schedule: {decay_iters: null}\n")
        assert load_config(path) == small
        assert load_config(path, ["lr_schedule.decay_iters="]) == small

    def test_inside_a_list(self, small_file, monkeypatch):
        monkeypatch.setitem(RENAMED, "data.corpus.share", "write data.corpus.weight")
        corpus = "data.corpus=[{kind: python-stdlib, share: %s}]"
        assert error_of(small_file, corpus % 2) == (
            "data.corpus.0.share (command line): write data.corpus.weight"
        )
        load_config(small_file, [corpus % "null"])


class TestErrors:
    def test_name_the_file_and_every_problem(self):
        values = yaml.safe_load(before("wsd", 0))
        values["lr_schedule"]["warm_up_iters"] = 3
        with pytest.raises(ConfigError) as caught:
            saved_config(values, "run/step_3/meta.json")
        assert len(caught.value.problems) == 2
        for problem, told in zip(
            sorted(caught.value.problems),
            (
                "lr_schedule.warm_up_iters (run/step_3/meta.json): unknown key; did you mean",
                "lr_schedule.wsd_decay_iters (run/step_3/meta.json): expected an integer of at",
            ),
            strict=True,
        ):
            assert problem.startswith(told)

    def test_a_class_that_is_missing_is_named_with_its_options(self):
        values = yaml.safe_load(BEFORE)
        values["lr_schedule"] = {"kind": "gone.schedules:Square", "options": {"timescale": 3}}
        with pytest.raises(ConfigError) as caught:
            saved_config(values, "run/step_3/meta.json")
        assert str(caught.value).startswith(
            'lr_schedule.kind (run/step_3/meta.json) is "gone.schedules:Square" with options '
            '{"timescale": 3}: there is no module gone: start in the folder that holds it'
        )

    def test_options_whose_key_is_another(self, tmp_path):
        pipeline = "pipeline: {schedule: gone:Fifo, schedule_options: {depth: 2}}\n"
        path = write(tmp_path, "config.yaml", SMALL + pipeline)
        with pytest.raises(ConfigError) as caught:
            load_saved(path)
        told = f'pipeline.schedule ({path}:9) is "gone:Fifo" with options {{"depth": 2}}: there is'
        assert str(caught.value).startswith(told)

    def test_a_class_that_is_named_alone(self, small_file):
        assert error_of(small_file, "log.observers=[gone:Norms]").startswith(
            'log.observers.0.kind (command line) is "gone:Norms": there is no module gone'
        )
