"""Whether the files that a configuration names are there. What they hold is checked where it is
read."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

from attnres_train.config.origin import has_begun
from attnres_train.config.schema import RunConfig


def checkpoint_problems(config: RunConfig) -> Iterator[str]:
    """What is missing of the checkpoint to resume from: it is a checkpoint, a folder of checkpoints
    or a run folder with ``checkpoints/``."""
    resume, load = config.checkpoint.resume, config.checkpoint.load
    folder = Path(config.run.dir) / config.run.name
    # What a run began from is not needed any more once its folder says what is.
    if resume not in ("auto", "never"):
        if load is not None:
            yield (
                "checkpoint.load and checkpoint.resume both name a checkpoint to begin from: leave "
                "one out"
            )
        if not has_begun(folder, resume):
            yield from _missing("checkpoint.resume", Path(resume).expanduser())
    elif load is not None and not any(folder.glob("checkpoints/step_*")):
        yield from _missing("checkpoint.load", Path(load).expanduser())


def _missing(key: str, path: Path) -> Iterator[str]:
    if not path.is_dir():
        yield f"{key}: there is no folder {path}{beside(path)}"
    elif not any(any(path.glob(trace)) for trace in ("meta.json", "step_*", "checkpoints/step_*")):
        yield f"{key}: there is no checkpoint (step_*) in {path}{beside(path)}"


def beside(path: Path) -> str:
    """What ``path`` or the nearest existing folder above it holds, names most like it first."""
    folder = next(folder for folder in (path, *path.parents) if folder.is_dir())
    wanted = str(path.relative_to(folder))
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    names.sort(key=lambda name: -difflib.SequenceMatcher(None, name, wanted).ratio())
    more = ", ..." if len(names) > 6 else ""
    return f"; {folder.absolute()} holds {', '.join(names[:6]) or 'nothing'}{more}"


def unread(key: str, kind: str) -> str:
    """What to tell where ``key`` is set, but ``kind`` does not read it."""
    return (
        f"{key} is not read with kind {kind}: remove it (or set it to null), or choose another kind"
    )
