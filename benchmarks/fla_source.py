"""Reference implementations in fla's source: the package itself needs Triton to be imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType


def fla_source(path: str) -> ModuleType | None:
    """The file at ``path`` below the fla package; None unless fla and einops are installed."""
    fla, einops = importlib.util.find_spec("fla"), importlib.util.find_spec("einops")
    if not (fla and fla.submodule_search_locations and einops):
        return None
    file = Path(fla.submodule_search_locations[0]) / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
