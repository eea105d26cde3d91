"""Configuration: typed schema, YAML loader, checks. Everything here is loaded on first use."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "ConfigError": "errors",
    "RunConfig": "schema",
    "check_config": "checks",
    "describe": "summary",
    "json_schema": "loader",
    "load_config": "loader",
    "save_config": "loader",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
