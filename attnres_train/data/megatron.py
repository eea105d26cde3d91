"""megatron-core's dataset modules, as this room uses them."""

from __future__ import annotations

import logging
from types import ModuleType

from attnres_train.megatron import megatron_core


def megatron_datasets(name: str) -> ModuleType:
    """The module ``megatron.core.datasets.<name>``.

    Its loggers warn about index caches that are left out on purpose: that concerns no user.
    """
    module = megatron_core(f"datasets.{name}")
    logging.getLogger("megatron.core.datasets").setLevel(logging.ERROR)
    return module
