"""Imports that make very many objects."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Python looks for no garbage meanwhile: what modules make stays, and to look through it again
    and again takes a sixth of the time in which torch and megatron-core are imported."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
