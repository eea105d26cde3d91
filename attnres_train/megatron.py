"""The one door to megatron-core, which is imported late and in silence."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from attnres_train.loading import without_collection


def megatron_core(name: str) -> ModuleType:
    """The module ``megatron.core.<name>``. The first import of any takes 2 to 4 s.

    What the import warns of and logs is not shown; an error is raised as ever.
    """
    with _quiet(), without_collection():
        module = importlib.import_module(f"megatron.core.{name}")
    # Said whenever one of its classes is used outside of a launcher, as data preparation does.
    warnings.filterwarnings("ignore", message="Could not determine (rank|world size) from")
    return module


@contextmanager
def _quiet() -> Iterator[None]:
    """No warning of megatron-core's, no deprecation of anybody's and no log below an error.

    The import tells that Transformer Engine, apex and a CUDA runtime are absent (`attnres-train
    doctor` tells it where it matters), that its own imports and torch's decorators that it uses are
    deprecated, and on Python 3.12 what the compiler finds in its docstrings. Warnings of others
    stay, such as torch's that the GPU's driver is too old.
    """
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        # A module's name or, where the compiler warns, its file.
        warnings.filterwarnings("ignore", module=r".*\bmegatron\b")
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        logging.disable(max(disabled, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(disabled)
