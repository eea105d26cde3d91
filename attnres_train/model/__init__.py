"""The model: single-process code that knows nothing of ranks. Operators and the chunk are loaded on
first use, so that `model.blocks` needs no torch."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Blocks": "blocks",
    "MicroBatch": "batch",
    "ModelChunk": "chunk",
    "chunk_kda": "kda.operator",
    "depth_attention": "depth.attention",
    "recurrent_kda_step": "kda.operator",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
