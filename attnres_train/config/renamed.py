"""Keys of before that are no longer there, and what to write in their place."""

from __future__ import annotations

from typing import Any

from attnres_train.config.yaml_text import KeyPath, dotted

RENAMED: dict[str, str] = {
    "lr_schedule.decay_iters": (
        "it meant two things; write lr_schedule.decay_end_iter with kind cosine (the step at which "
        "the minimum is reached), lr_schedule.wsd_decay_iters with kind wsd (the steps that the "
        "decay at the end takes)"
    ),
}
"""Old key, list elements without their index -> what the error about it says."""


def instead(path: KeyPath) -> str | None:
    """What to write in place of the unknown key at ``path``; None if it never was one."""
    return RENAMED.get(dotted(tuple(step for step in path if not isinstance(step, int))))


def drop_unset(values: Any) -> None:
    """Take the old keys that are null out of ``values``, those of a whole configuration.

    A run folder's ``config.yaml`` holds every key there was, set or not: null changes nothing, so
    that such a file can be trained from as it is.
    """
    for key in RENAMED:
        *sections, name = key.split(".")
        _drop_unset(values, sections, name)


def _drop_unset(values: Any, sections: list[str], name: str) -> None:
    if isinstance(values, list):
        for item in values:
            _drop_unset(item, sections, name)
    elif isinstance(values, dict) and sections:
        _drop_unset(values.get(sections[0]), sections[1:], name)
    elif isinstance(values, dict) and name in values and values[name] is None:
        del values[name]
