"""Where the run in a run folder began, if `checkpoint.resume` said so: with a path, or ``never``.

It is kept in ``origin.json``, so that the same command, given again, goes on with the run that it
has begun.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "origin.json"


@dataclass(frozen=True)
class Origin:
    """``resume`` is what was asked for (`as_asked`), ``checkpoint`` the step folder that the run
    began from; None: from the beginning."""

    resume: str
    checkpoint: str | None


def as_asked(resume: str) -> str:
    """`checkpoint.resume` such that the same place has the same name: ``auto``, ``never``, or an
    absolute path."""
    if resume in ("auto", "never"):
        return resume
    return str(Path(resume).expanduser().absolute())


def read_origin(folder: Path) -> Origin | None:
    """That of run folder ``folder``; None where the run has just begun there, or has none."""
    try:
        return Origin(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_origin(folder: Path, origin: Origin | None) -> None:
    """Keep, or forget, where the run in ``folder`` began."""
    if origin is None:
        (folder / FILE).unlink(missing_ok=True)
        return
    partial = folder / f"{FILE}.partial"
    partial.write_text(json.dumps(asdict(origin), indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / FILE)


def has_begun(folder: Path, resume: str) -> bool:
    """Whether the run in ``folder`` is the one that ``checkpoint.resume=resume`` began."""
    origin = read_origin(folder)
    return origin is not None and origin.resume == as_asked(resume)
