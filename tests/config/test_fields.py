from __future__ import annotations

import pytest

from attnres_train.config.fields import all_keys, expected, is_section, nearest
from attnres_train.config.schema import RunConfig


def sections(section=RunConfig):
    yield section
    for field in section.model_fields.values():
        inner = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for annotation in filter(is_section, inner):
            yield from sections(annotation)


@pytest.mark.parametrize("section", dict.fromkeys(sections()), ids=lambda section: section.__name__)
def test_every_field_is_documented_and_has_words_for_its_type(section):
    for name, field in section.model_fields.items():
        assert field.description and field.description.rstrip().endswith((".", ")", ":")), name
        words = expected(field.annotation, field.metadata)
        assert words and "class" not in words and "typing" not in words, (name, words)


def test_keys_reach_into_sections_and_lists():
    keys = all_keys()
    assert {"model", "model.residual.block_size", "data.corpus.path", "log.wandb.mode"} <= set(keys)
    assert len(keys) == len(set(keys))


def test_a_key_is_recognised_with_a_letter_missing():
    for key in all_keys():
        parent, dot, name = key.rpartition(".")
        for i in {0, len(name) // 2} if len(name) > 4 else ():
            assert key in nearest(parent + dot + name[:i] + name[i + 1 :])


def test_a_key_in_the_wrong_section_is_recognised():
    for key in all_keys():
        name = key.rpartition(".")[2]
        assert any(guess.rpartition(".")[2] == name for guess in nearest(f"elsewhere.{name}"))
