"""Configurations that a program saved: in a run folder (``config.yaml``) or with a checkpoint.

A user's own file has to keep up with the keys (see `config.renamed`); what a program wrote,
whatever its age, is read as it was meant.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attnres_train.config.loader import config_of
from attnres_train.config.schema import RunConfig
from attnres_train.config.tree import Tree, read_tree

_DECAY_ITERS = {"cosine": "decay_end_iter", "wsd": "wsd_decay_iters"}
"""By kind, what `lr_schedule.decay_iters` meant; other kinds did not read it."""


def load_saved(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The configuration in a run folder's file ``path``, under ``overrides`` (``key.path=value``).

    Raises ConfigError, with the file and line of every problem.
    """
    tree = read_tree(Path(path))
    tree.values = upgraded(tree.values)
    return config_of(tree, overrides)


def saved_values(path: str | Path) -> dict[str, Any]:
    """The plain values in a run folder's file ``path``, with the keys of now; unlike `load_saved`
    also where a class of the user's is gone."""
    return upgraded(read_tree(Path(path)).values)


def saved_config(values: dict[str, Any], place: str | Path) -> RunConfig:
    """The configuration with the plain ``values`` that were saved in the file ``place``.

    Raises ConfigError that names ``place``; where a class of the user's is missing, its name and
    its options too.
    """
    return config_of(Tree(upgraded(values), {(): str(place)}))


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """Plain ``values`` of any earlier time, with the keys of now."""
    values = dict(values)
    schedule = values.get("lr_schedule")
    if isinstance(schedule, dict) and "decay_iters" in schedule:
        schedule = dict(schedule)
        decay = schedule.pop("decay_iters")
        if key := _DECAY_ITERS.get(schedule.get("kind", "cosine")):
            schedule.setdefault(key, decay)
        values["lr_schedule"] = schedule
    return values
