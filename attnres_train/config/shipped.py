"""The configurations that come with the package, for users without a clone."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path:
    """``configs/``: within an installed package, else beside it in the repository."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


STUDIES = "studies"
"""The folder of study files, which are no configurations of a run."""


def names() -> list[str]:
    """What `find` finds, e.g. ``quickstart``, ``variants/mhc_lite``."""
    root = folder()
    found = (file.relative_to(root).with_suffix("") for file in root.rglob("*.yaml"))
    return sorted(name.as_posix() for name in found if name.parts[0] != STUDIES)


def studies() -> list[str]:
    """The names of study files that come with the package."""
    return sorted(file.stem for file in (folder() / STUDIES).glob("*.yaml"))


def find_study(name: str | Path) -> Path:
    """The study file ``name``; where there is none and it is one of `studies`, that one."""
    is_shipped = not Path(name).is_file() and str(name) in studies()
    return folder() / STUDIES / f"{name}.yaml" if is_shipped else Path(name)


def find(name: str | Path, beside: Path | None = None) -> Path:
    """The file ``name``, relative to the folder ``beside``; where there is none and ``name`` is one
    of `names`, that configuration."""
    file = Path(os.path.normpath(beside / name)) if beside else Path(name)
    if not file.is_file() and str(name) in names():
        return folder() / f"{name}.yaml"
    return file
