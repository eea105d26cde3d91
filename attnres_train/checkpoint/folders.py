"""A folder of checkpoints: its step folders, the newest of them, which one to resume from.

checkpoints/step_00000100            complete
checkpoints/step_00000100.replaced   complete, about to be deleted for a newer one of its step
checkpoints/step_00000200.tmp-*      being written or deleted; left over if nobody is at it
checkpoints/step_00000300.damaged    found damaged, kept for the user to look at, passed over
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from attnres_train.checkpoint.manifest import (
    META,
    BrokenCheckpoint,
    Manifest,
    read_manifest,
)
from attnres_train.checkpoint.sealed import sync_folder
from attnres_train.config.origin import has_begun, read_origin
from attnres_train.errors import UserError

logger = logging.getLogger(__name__)

# A replaced one counts: between the two renames of `publish` there is no other of its step.
_STEP = re.compile(r"step_\d{8,}(\.replaced)?")
KEEP_BEFORE = "keep_before"
"""In `Manifest.extras`: steps, the newest checkpoint before each of which stays."""
_NOTHING: Mapping[Path, str] = MappingProxyType({})


class Found(NamedTuple):
    """A step folder and either its manifest or what is wrong with it."""

    path: Path
    manifest: Manifest | None
    problem: str | None

    def __str__(self) -> str:
        return f"{self.path} ({'complete' if self.problem is None else self.problem})"


class Keep(NamedTuple):
    """Which complete checkpoints stay: the newest ``last``, those of every ``every`` steps (0: none
    of them), and the newest from before each step that the newest one names (`KEEP_BEFORE`)."""

    last: int
    every: int = 0

    def reasons(self, complete: Sequence[Found]) -> dict[Path, str]:
        """Those of ``complete``, from old to new, that stay, and why."""
        why = {}
        for entry in _before_spikes(complete):
            why[entry.path] = "before a loss spike"
        for number, entry in enumerate(reversed(complete), 1):
            step = entry.manifest.step if entry.manifest else 0
            if number == 1:
                why[entry.path] = "newest"
            elif number <= self.last:
                why[entry.path] = f"among the last {self.last}"
            elif step and self.every and step % self.every == 0:
                why[entry.path] = f"every {self.every} steps"
        return why


def _before_spikes(complete: Sequence[Found]) -> Iterator[Found]:
    newest = complete[-1].manifest if complete else None
    for bound in newest.extras.get(KEEP_BEFORE, ()) if newest else ():
        before = [entry for entry in complete if entry.manifest and entry.manifest.step < bound]
        yield from before[-1:]


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def scan(folder: Path, damaged: Mapping[Path, str] = _NOTHING) -> list[Found]:
    """The step folders in ``folder``: broken ones first, then complete ones from old to new. Those
    in ``damaged``, path to problem, are broken too: sizes alone do not show it."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    # By serial and not by step: a run that went back to an earlier checkpoint passes steps again.
    steps = [path for path in paths if _STEP.fullmatch(path.name) and path.is_dir()]
    found = [_look(p) if p not in damaged else Found(p, None, damaged[p]) for p in steps]
    return sorted(found, key=lambda entry: entry.manifest.serial if entry.manifest else -1)


def _look(path: Path) -> Found:
    try:
        return Found(path, read_manifest(path), None)
    except BrokenCheckpoint as error:
        return Found(path, None, str(error).removeprefix(f"{path}: "))


def next_serial(folder: Path) -> int:
    """The serial of the next checkpoint to be published in ``folder``."""
    return 1 + max((entry.manifest.serial for entry in scan(folder) if entry.manifest), default=0)


def find_latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``, None without one. Broken ones are passed over
    with a warning in the log."""
    return _newest(scan(folder))


def newest_in(path: Path) -> Path:
    """The step folder that ``path`` is, or the newest complete one of the run folder, or folder of
    step folders, that it is.

    Raises UserError where there is none, with those that are broken.
    """
    if (path / META).is_file():
        return path
    there = scan(path / "checkpoints") or scan(path)
    newest = _newest(there)
    if newest is None:
        gone = "" if path.is_dir() else " (there is no such folder)"
        raise UserError(
            f"{path} holds no complete checkpoint{gone}: name a run folder or a step folder"
            f"{_listing(there)}"
        )
    return newest


def _newest(found: list[Found]) -> Path | None:
    for entry in found:
        if entry.problem:
            logger.warning("passing over broken checkpoint %s: %s", entry.path, entry.problem)
    complete = [entry.path for entry in found if entry.manifest]
    return complete[-1] if complete else None


def resolve_resume(
    resume: str, folder: Path, damaged: Mapping[Path, str] = _NOTHING
) -> Path | None:
    """The step folder that `checkpoint.resume` asks for; None: start from the beginning.

    ``folder`` is the run's own checkpoint folder, in its run folder. ``auto`` gives the newest
    complete checkpoint in it, or None if there is nothing at all. ``never``, which gives None, and
    a path (a step folder, a folder of them, or a run folder with ``checkpoints/``) say where a run
    begins: once they have begun the run in this folder (`config.origin`), its newest checkpoint
    comes first. ``damaged`` ones are passed over as in `scan`.

    Raises UserError, with a list of what exists, where a path leads to no complete checkpoint and
    where there are broken ones only of the run that is to go on: starting over would be a surprise.
    """
    begun = has_begun(folder.parent, resume)
    if resume == "auto" or begun:
        found = scan(folder, damaged)
        newest = _newest(found)
        if found and newest is None:
            advice = "begin again under another run.name"
            if resume != "never":
                advice = "start over with checkpoint.resume=never"
            advice = f"Repair or remove them, or {advice}."
            raise UserError(f"no complete checkpoint in {folder}:{_listing(found)}\n{advice}")
        if newest or resume == "auto":
            return newest
    if resume == "never":
        return None
    origin = read_origin(folder.parent) if begun else None
    # It may have been moved aside when the run began.
    path = origin.checkpoint if origin and origin.checkpoint else resume
    return resolve_path("checkpoint.resume", path, folder)


def resolve_path(key: str, place: str, folder: Path) -> Path:
    """The step folder at the path ``place`` of the option ``key``, as in `resolve_resume`."""
    path = Path(place).expanduser()
    # A step folder may have been copied under another name; a broken one may lack its list.
    is_step = _STEP.fullmatch(path.name) or (path / META).exists()
    if is_step:
        there, entry = scan(path.parent), _look(path)
        newest, problem = (path if entry.manifest else None), entry.problem
    else:
        there = scan(path / "checkpoints") or scan(path)
        newest, problem = _newest(there), "no complete checkpoint in it"
    if newest is not None:
        return newest
    problem = problem if path.is_dir() else "no such folder"
    listing = _listing({str(entry): entry for entry in there + scan(folder)}) or " none"
    raise UserError(f"{key}={path}: {problem}. Checkpoints that exist:{listing}")


def _listing(found: Iterable[Found | str]) -> str:
    return "".join(f"\n  {entry}" for entry in found)


def older_than(path: Path) -> Path | None:
    """The complete checkpoint before ``path``, which is damaged, among those beside it."""
    before = []
    for found in scan(path.parent):
        if found.path == path and found.manifest:
            break
        if found.manifest:
            before.append(found.path)
    return before[-1] if before else None


def broken_after(path: Path, damaged: Mapping[Path, str]) -> dict[Path, str]:
    """Broken checkpoints beside ``path`` of later steps, or of its own, and what is wrong."""
    return {
        found.path: found.problem
        for found in scan(path.parent, damaged)
        if found.problem and found.path not in damaged and step_of(found.path) >= step_of(path)
    }


def step_of(path: Path) -> int:
    """By the name of a step folder."""
    return int(path.name.removeprefix("step_").partition(".")[0])


def set_aside(path: Path) -> Path:
    """Rename a damaged step folder, so that it is not chosen again; returns where it lies now. A
    failure to do so is only logged."""
    number, aside = 0, path.with_name(f"{path.name}.damaged")
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.damaged-{number}")
    try:
        return path.rename(aside)
    except OSError as error:
        logger.warning("could not rename the damaged checkpoint %s: %s", path, error)
        return path


def publish(partial: Path, step: int) -> Path:
    """Rename a fully written folder to its final name and return that, once it is on the disk. A
    checkpoint of the same step is replaced, and stays loadable until it is; a broken one is set
    aside."""
    final = partial.with_name(step_name(step))
    replaced = final.with_name(f"{final.name}.replaced")
    # A rename is all or nothing, but does not replace a folder that holds files: the old one makes
    # way first.
    if final.exists() and _look(final).problem:
        set_aside(final)
    elif final.exists():
        remove(replaced)
        final.rename(replaced)
    partial.rename(final)
    # Until the new name is on the disk a power cut may undo the rename: the old one is needed.
    sync_folder(final.parent)
    remove(replaced)
    return final


def prune(folder: Path, keep: Keep, loaded_from: Path | None) -> None:
    """Delete complete checkpoints but those to ``keep`` and ``loaded_from``. Broken ones stay for
    the user to look at; a failure to delete is only logged."""
    try:
        for path in surplus(folder, keep, loaded_from):
            remove(path)
    except OSError as error:
        logger.warning("could not look for old checkpoints in %s: %s", folder, error)


def surplus(folder: Path, keep: Keep, loaded_from: Path | None) -> list[Path]:
    """What `prune` deletes."""
    complete = [entry for entry in scan(folder) if entry.manifest]
    kept = {path.resolve() for path in keep.reasons(complete)}
    kept |= {loaded_from.resolve()} if loaded_from else set()
    return [entry.path for entry in complete if entry.path.resolve() not in kept]


def remove_partial(folder: Path) -> None:
    """Delete what interrupted saves and deletions left behind."""
    # A run folder has one run at a time (`supervise.run_lock`): nobody is writing these any more.
    for path in folder.glob("step_*.tmp-*"):
        remove(path)


def remove(path: Path) -> None:
    """Delete a step folder if it is there; hidden first, lest a half-deleted one looks broken."""
    try:
        if not path.exists():
            return
        hidden = path if ".tmp-" in path.name else path.rename(f"{path}.tmp-deleted")
        shutil.rmtree(hidden)
    except OSError as error:
        logger.warning("could not delete checkpoint %s: %s", path, error)
