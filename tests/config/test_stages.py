"""`stages` in a configuration: each is whole, the first on top, problems name the stage's keys."""

from __future__ import annotations

import pytest

from attnres_train.config import ConfigError, check_config, load_config
from attnres_train.config.fields import all_keys, holds_sections
from attnres_train.config.loader import as_yaml, load_with_places
from attnres_train.config.schema import RunConfig
from attnres_train.config.stage_values import keys, stage_values
from attnres_train.config.stages import called, stage_configs
from tests.config.helpers import error_of, write

TWO = """
extends: quickstart
train: {train_iters: 40}
lr_schedule: {kind: cosine, warmup_iters: 10, decay_end_iter: 30}
stages:
  - name: first
  - name: second
    train: {train_iters: 20, seq_length: 512}
    optimizer: {lr: 1e-4}
    model: {moe: {bias_update_rate: 0}}
  - name: third
    lr_schedule: {kind: wsd}
"""


@pytest.fixture
def two(tmp_path):
    return write(tmp_path, "two.yaml", TWO)


def test_each_stage_is_the_base_with_its_own_values(two):
    config = load_config(two)
    first, second, third = stage_configs(config)
    assert [one.train.train_iters for one in (first, second, third)] == [40, 20, 40]
    assert config.total_iters == 100
    assert [one.train.seq_length for one in (first, second, third)] == [256, 512, 256]
    assert (second.optimizer.lr, second.optimizer.kind) == (1e-4, "muon")
    assert (first.model.moe.bias_update_rate, second.model.moe.bias_update_rate) == (1e-3, 0)
    assert second.model.moe.num_experts == first.model.moe.num_experts == 8
    # What is outside of `stages` is the first one, and a stage knows all of them.
    assert first == config and stage_configs(third) == [first, second, third]
    assert called(config, 1) == "stage second (2 of 3)"


def test_a_schedule_is_a_stages_own_or_the_runs_without_warm_up(two):
    first, second, third = (one.lr_schedule for one in stage_configs(load_config(two)))
    assert (first.kind, first.warmup_iters, first.decay_end_iter) == ("cosine", 10, 30)
    assert (second.kind, second.warmup_iters, second.decay_end_iter) == ("cosine", 0, 30)
    assert (third.kind, third.warmup_iters, third.decay_end_iter) == ("wsd", 0, None)


def test_what_is_written_loads_again_whichever_stage_is_on_top(two, tmp_path):
    config = load_config(two)
    for number, stage in enumerate(stage_configs(config)):
        again = write(tmp_path, "again.yaml", as_yaml(stage))
        assert load_config(again) == config
        plain = stage.model_dump(mode="json")
        base = {name: value for name, value in plain.items() if name != "stages"}
        assert stage_values(config.model_dump(mode="json"), number) == base
    assert stage_configs(load_config("quickstart")) == [load_config("quickstart")]


def test_a_value_says_where_it_was_written(two):
    _, places = load_with_places(two)
    assert places["train", "train_iters"] == f"{two}:3"
    assert places["stages", 1, "train", "seq_length"] == f"{two}:8"
    _, places = load_with_places(two, ["stages.0.lr_schedule.kind=constant"])
    assert places["lr_schedule", "kind"] == "command line"
    assert ("lr_schedule", "decay_end_iter") not in places


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("stages.1.train.seq_length=no", "stages.1.train.seq_length (command line): expected an "),
        ("stages.1.train.seqlen=3", "did you mean stages.1.train.seq_length=3?"),
        ("stages.1.model.hidden_size=64", "model.hidden_size is the same in all stages: write it"),
        ("stages.1.name=null", "stages.1.name (command line): expected non-empty text, not null"),
        ("train.global_batch_size=x", "train.global_batch_size (command line): expected an integ"),
        ("train.seqlen=3", "did you mean train.seq_length=3?"),
    ],
)
def test_errors_name_the_users_key_once(two, override, told):
    message = error_of(two, override)
    assert told in message
    assert "problems" not in message


def test_a_key_that_no_stage_would_read_is_refused_on_the_command_line(two):
    load_config(two, ["optimizer.lr=1e-3"])
    whole = ["stages.0.optimizer.lr=1e-3", "stages.2.optimizer.lr=1e-3"]
    message = error_of(two, *whole, "optimizer.lr=2e-3")
    assert message == (
        "optimizer.lr (command line): every stage has its own, so that none would read it: write "
        "stages.0.optimizer.lr=2e-3, and so on"
    )


def test_a_key_may_stand_in_the_stages_alone(tmp_path):
    text = TWO.replace(
        "extends: quickstart", "model: {hidden_size: 8, num_layers: 2, vocab_size: 9}"
    )
    text = text.replace("train: {train_iters: 40}", "train: {global_batch_size: 4}")
    message = error_of(write(tmp_path, "alone.yaml", text))
    assert "train.seq_length: missing" in message and "train.train_iters: missing" in message
    text = text.replace("- name: first", "- {name: first, train: {train_iters: 4, seq_length: 8}}")
    text = text.replace("- name: third", "- {name: third, train: {train_iters: 4, seq_length: 8}}")
    text = text.partition("    lr_schedule: {kind: wsd}")[0]
    config = load_config(write(tmp_path, "alone.yaml", text))
    assert [stage.train.train_iters for stage in config.stages] == [4, 20, 4]


def test_relations_are_checked_in_every_stage(two):
    def problems(*overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            check_config(load_config(two, overrides), 4)
        return caught.value.problems

    (one,) = problems("stages.1.train.global_batch_size=6")
    assert one.startswith(
        "stages.1.train.global_batch_size 6 is not divisible by 4 (stages.1.train.mi"
    )
    (one,) = problems("stages.2.lr_schedule.decay_end_iter=3")
    assert one.startswith("stages.2.lr_schedule.decay_end_iter is not read with kind wsd")
    (one,) = problems("train.global_batch_size=6")  # of all: the base's
    assert one.startswith("train.global_batch_size 6 is not")
    (one,) = problems("stages.1.name=first")
    assert one == "stages: 2 are called first: give each a name of its own"


def test_a_stage_has_the_keys_that_are_documented():
    of_stages = {key for key in all_keys() if key.startswith("stages.") and not holds_sections(key)}
    corpus = {f"data.corpus.{name}" for name in ("kind", "path", "weight", "text_field", "options")}
    own = {f"stages.{key}" for key in {*keys(), *corpus} - {"data.corpus"}}
    assert of_stages == own | {"stages.name"}
    assert {key.removeprefix("stages.") for key in own} <= set(all_keys())
    assert RunConfig.model_fields["stages"].description
