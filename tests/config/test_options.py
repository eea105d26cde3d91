"""The options as people find them: all of them, in order, and by a word."""

from __future__ import annotations

from itertools import pairwise

import pytest

from attnres_train.config.fields import all_keys, as_written, holds_sections
from attnres_train.config.kinds import CHOICES
from attnres_train.config.options import Option, groups, search
from attnres_train.config.tree import parse_override


def option(key: str) -> Option:
    (found,) = [o for group in groups() for o in group.options if o.key == key]
    return found


def keys(*words: str) -> list[str]:
    return [option.key for option in search(words)]


def test_every_key_is_there_once_in_the_order_of_the_schema():
    wanted = [key for key in all_keys() if not holds_sections(key)]
    lists = ["data.corpus", "log.observers", "stages", "stages.data.corpus"]
    for group in groups()[1:]:
        found = [option.key.replace("[]", "") for option in group.options]
        order = [key for key in [*all_keys()] if key in found]
        assert found == order, group.key
    found = [option.key.replace("[]", "") for group in groups() for option in group.options]
    assert sorted(found) == sorted([*wanted, *lists, "extends"])


def test_sections_come_in_the_order_of_the_schema():
    places = [all_keys().index(group.key.replace("[]", "")) for group in groups()[1:]]
    assert all(one < other for one, other in pairwise(places))


@pytest.mark.parametrize(
    ("key", "type_", "default"),
    [
        ("train.micro_batch_size", "integer of at least 1", "1"),
        ("train.train_iters", "integer of at least 1", None),
        ("train.stop_after", "integer of at least 1 or null", "null"),
        ("train.precision", "one of fp32, bf16, bf16_params", "fp32"),
        ("optimizer.betas", "list of 2 numbers", "[0.9, 0.95]"),
        ("optimizer.eps", "number above 0", "1e-08"),
        ("log.plot", "true or false", "true"),
        ("model.residual.kind", "kind", "block"),
        ("model.residual.options", "section with the options that the kind declares", "{}"),
        ("data.corpus", "non-empty list of sections", '[{"kind": "python-stdlib"}]'),
        ("data.corpus[].kind", "kind", None),
    ],
)
def test_type_and_default(key, type_, default):
    assert (option(key).type, option(key).default) == (type_, default)


def test_a_default_means_the_same_when_it_is_written_out():
    for group in groups()[1:]:
        for one in group.options:
            if one.default is not None and "[]" not in one.key:
                tree = parse_override(f"{one.key}={one.default}")
                value = tree.at(tuple(one.key.split(".")))
                assert value is not None or one.default == "null", one.key


@pytest.mark.parametrize("choice", CHOICES)
def test_every_kind_of_ours_says_what_it_is(choice):
    key = {"data.corpus.kind": "data.corpus[].kind", "log.observers.kind": "log.observers[].kind"}
    found = option(key.get(choice, choice))
    assert found.is_kind
    assert [name for name, _ in found.kinds] == list(CHOICES[choice].built_in)
    for name, text in found.kinds:
        assert text.endswith((".", "!")) and len(text) > 8, (name, text)


class TestSearch:
    def test_every_option_is_found_by_its_name_and_first(self):
        for group in groups():
            for one in group.options:
                name = one.key.rpartition(".")[2]
                assert one.key in keys(one.key)
                first = keys(name)[0].rpartition(".")[2]
                assert first == name

    def test_in_key_and_meaning_whatever_the_case(self):
        assert keys("MICRO_batch") == keys("micro-batch")
        assert "train.micro_batch_size" in keys("micro_batch")
        assert "optimizer.ns_steps" in keys("newton-schulz")
        assert "model.residual.kind" in keys("PreNorm")

    def test_all_words_must_match(self):
        assert keys("epsilon", "latent") == ["model.mla.kv_norm_eps"]
        assert keys("epsilon", "zzz") == []

    def test_by_the_words_of_other_frameworks(self):
        assert keys("learning_rate")[0] == "optimizer.lr"
        assert keys("ep")[0] == "parallel.expert_model_parallel_size"
        assert keys("--per-device-train-batch-size") == ["train.micro_batch_size"]

    def test_beginnings_of_words_before_their_insides(self):
        assert "train.train_iters" not in keys("ep")  # "step" has it inside
        assert keys("chulz") == keys("schulz") != []

    def test_as_on_the_command_line(self):
        assert keys("data.corpus.0.weight=2") == ["data.corpus[].weight"]
        assert keys("data.corpus[].weight") == ["data.corpus[].weight"]


def test_keys_as_they_are_written():
    assert as_written("data.corpus.path") == "data.corpus.0.path"
    assert as_written("data.corpus.path", ("data", "corpus", 3, "pth")) == "data.corpus.3.path"
    assert as_written("data.corpus.path", ("data", "tokenizer", "pth")) == "data.corpus.0.path"
    assert as_written("train.seq_length", ("data", "corpus", 3)) == "train.seq_length"
    assert as_written("data.corpus") == "data.corpus"
