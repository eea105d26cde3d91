"""The names that a user's classes are made of."""

from __future__ import annotations

from attnres_train import extend
from attnres_train.config.kinds import CHOICES


def test_every_choice_has_its_base_there() -> None:
    for choice, table in CHOICES.items():
        module, _, name = table.base.partition(":")
        assert name in extend.__all__, choice
        assert getattr(extend, name).__module__ == module


def test_every_class_says_what_it_is() -> None:
    for name in extend.__all__:
        if isinstance(found := getattr(extend, name), type):
            assert found.__doc__, name
