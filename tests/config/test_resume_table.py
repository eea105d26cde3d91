"""What a changed key means for a resume: every key has its place, in the code and in the docs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from attnres_train.config import load_config
from attnres_train.config.fields import all_keys, holds_sections
from attnres_train.config.resume_table import EFFECTS, Effect, changes, effect_of
from attnres_train.config.saved import upgraded
from attnres_train.config.schema import RunConfig

KEYS = [key for key in all_keys() if not holds_sections(key)]
PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"
ONE_STAGE = "stages=[{name: whole}]"
MEANING = {
    Effect.MODEL: "refused: the weights mean something else",
    Effect.DATA: "refused: the position in the data means something else",
    Effect.TOKENIZER: "refused: token ids mean something else",
    Effect.RECIPE: "allowed, told and kept",
    Effect.STAGE: "as the key outside of `stages` while the stage is under way "
    "([stages.md](stages.md))",
    Effect.NONE: "not told: nothing that is learnt changes, but for rounding",
}


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    config = load_config("quickstart", ["log.observers=[tests.own_observers:Quiet]", ONE_STAGE])
    return config.model_dump(mode="json")


def test_every_key_of_the_schema_is_placed_and_nothing_else():
    assert set(KEYS) == set(EFFECTS)
    assert len(EFFECTS) > 100


@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_is_changed_alone_is_found_alone(plain, key):
    changed = RunConfig.model_validate(plain).model_dump(mode="json")
    *places, name = key.split(".")
    section = changed
    for place in places:
        section = section[place][0] if isinstance(section[place], list) else section[place]
    assert name in section
    section[name] = "another"
    (change,) = changes(plain, changed)
    assert (change.after, change.effect) == ("another", EFFECTS[key])
    assert change.key.replace(".0.", ".") == key


def test_nothing_is_changed_by_loading_again(plain):
    assert changes(plain, RunConfig.model_validate(plain).model_dump(mode="json")) == []


def test_keys_that_came_later_had_their_default(plain):
    older = upgraded(plain)
    older["model"] = {k: v for k, v in plain["model"].items() if k != "mla"}
    older["model"]["kda"] = {k: v for k, v in plain["model"]["kda"].items() if k != "gate"}
    del older["checkpoint"], older["train"]["clip_grad"]
    mla = {c.key for c in changes(older, plain)}
    assert mla <= {key for key in KEYS if key.startswith(("model.mla.", "checkpoint."))}
    newer = RunConfig.model_validate(plain).model_dump(mode="json")
    newer["model"]["kda"]["gate"] = "lower_bound"
    assert "model.kda.gate softplus -> lower_bound" in map(str, changes(older, newer))


@pytest.mark.parametrize(("old", "new"), [(None, "gpt2"), ("gpt2", None)])
def test_two_ways_to_say_the_same_are_no_change(plain, old, new):
    before, after = (RunConfig.model_validate(plain).model_dump(mode="json") for _ in range(2))
    before["data"]["tokenizer"]["pattern"], after["data"]["tokenizer"]["pattern"] = old, new
    assert changes(before, after) == []
    after["data"]["tokenizer"]["pattern"] = "kimi"
    assert [change.key for change in changes(before, after)] == ["data.tokenizer.pattern"]


def test_another_number_of_corpora(plain):
    more = RunConfig.model_validate(plain).model_dump(mode="json")
    more["data"]["corpus"].append({"kind": "text", "path": "more"})
    found = {change.key: change for change in changes(plain, more)}
    assert str(found["data.corpus.1.kind"]) == "data.corpus.1.kind nothing -> text"
    assert found["data.corpus.1.kind"].effect == Effect.DATA


def test_a_key_that_nobody_placed_is_the_models():
    assert effect_of(("model", "new_key")) == Effect.MODEL


def test_the_docs_have_the_table():
    """To mend it, put this text there."""
    rows = [
        f"| {effect.value} | {MEANING[effect]} | "
        + ", ".join(f"`{key}`" for key in KEYS if EFFECTS[key] == effect)
        + " |"
        for effect in Effect
    ]
    table = "\n".join(["| place | when changed | keys |", "| --- | --- | --- |", *rows])
    assert table in PAGE.read_text(encoding="utf-8"), table
