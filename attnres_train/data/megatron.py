"""The one door to megatron-core's dataset modules."""

from __future__ import annotations

import importlib
import logging
import warnings
from types import ModuleType


def megatron_datasets(name: str) -> ModuleType:
    """The module ``megatron.core.datasets.<name>``.

    Its first import takes some 4 s, and warns that Transformer Engine and apex are absent and that
    its own imports are deprecated; its loggers warn about index caches that are left out on
    purpose. None of it concerns a user.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex")
        warnings.simplefilter("ignore", DeprecationWarning)
        module = importlib.import_module(f"megatron.core.datasets.{name}")
    logging.getLogger("megatron.core.datasets").setLevel(logging.ERROR)
    return module
