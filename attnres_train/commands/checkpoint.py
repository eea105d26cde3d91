"""`attnres-train checkpoint ls|verify|prune|diff RUN`: look at, and after, a run's checkpoints."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from attnres_train.checkpoint import folders
from attnres_train.checkpoint.folders import Found, Keep
from attnres_train.checkpoint.manifest import META, Manifest, read_manifest
from attnres_train.checkpoint.verify import differences, verify
from attnres_train.commands.output import show
from attnres_train.config.resume_table import changes
from attnres_train.config.saved import load_saved, upgraded
from attnres_train.errors import UserError
from attnres_train.supervise.run_lock import run_lock

SHOWN = 20


def run(args: argparse.Namespace) -> int:
    run_folder, words = Path(args.run).expanduser(), args.words
    if args.yes and args.action != "prune":
        raise UserError(f"--yes: {args.action} deletes nothing")
    if args.action == "diff":
        if len(words) != 1:
            raise UserError("diff takes two: run folders, or step folders")
        return show_differences(
            newest_in(run_folder), newest_in(Path(words[0]).expanduser()), SHOWN
        )
    if args.action == "prune":
        return prune(run_folder, words, really=args.yes)
    if words:
        raise UserError(f"{args.action} takes one folder: {words[0]} is too many")
    return verify_all(run_folder) if args.action == "verify" else list_all(run_folder)


def _place(path: Path) -> Path:
    """The folder of step folders that ``path``, a run folder or it itself, means."""
    own = path / "checkpoints"
    place = own if own.is_dir() else path
    if not place.is_dir():
        raise UserError(f"{path}: there is no such folder")
    return place


def newest_in(path: Path) -> Path:
    """The step folder that ``path`` is, or the newest complete one in it."""
    if (path / META).is_file():
        return path
    newest = folders.find_latest(_place(path))
    if newest is None:
        raise UserError(f"{path} holds no complete checkpoint: name a run folder or a step folder")
    return newest


def keep_of(place: Path, overrides: Sequence[str] = ()) -> Keep:
    """What the run whose checkpoints are in ``place`` keeps; the default where it has no config."""
    config = place.parent / "config.yaml"
    if not config.is_file():
        if overrides:
            raise UserError(f"{overrides[0]}: {config} is missing, which it would change")
        return Keep(last=2)
    section = load_saved(config, overrides).checkpoint
    return Keep(section.keep_last, section.keep_every)


def list_all(path: Path) -> int:
    """Print a line per step folder, from old to new, those set aside last."""
    place = _place(path)
    found = folders.scan(place)
    kept = keep_of(place).reasons([entry for entry in found if entry.manifest])
    aside = [Found(p, None, "set aside") for p in sorted(place.glob("step_*.damaged*"))]
    aside += [Found(p, None, "not complete") for p in sorted(place.glob("step_*.tmp-*"))]
    head = ("checkpoint", "size", "age", "state", "written by", "kept")
    rows = [head, *(_row(entry, kept.get(entry.path, "no")) for entry in [*found, *aside])]
    if len(rows) == 1:
        raise UserError(f"{path} holds no checkpoint (step_*)")
    show(_table(rows))
    return 0


def _row(entry: Found, kept: str) -> tuple[str, ...]:
    written = _layout(entry.manifest) if entry.manifest else "-"
    state = entry.problem or "whole"
    age = _age(time.time() - entry.path.stat().st_mtime)
    why = kept if entry.manifest else "for you to look at"
    return entry.path.name, _size(_bytes_in(entry.path)), age, state, written, why


def _layout(manifest: Manifest) -> str:
    parallel = manifest.extras.get("config", {}).get("parallel", {})
    stages = parallel.get("pipeline_model_parallel_size", 1)
    virtual = parallel.get("virtual_pipeline_model_parallel_size") or 1
    count = manifest.num_ranks
    return f"{count} rank{'s' if count > 1 else ''}, {stages} x {virtual} stages"


def verify_all(path: Path) -> int:
    """Read every byte of a step folder, or of all in a run folder. Returns 1 if one is damaged."""
    place = path if (path / META).is_file() else _place(path)
    paths = [path] if place == path and (path / META).is_file() else _steps(place)
    if not paths:
        raise UserError(f"{path} holds no checkpoint (step_*)")
    damaged = 0
    for step_folder in paths:
        result = verify(step_folder)
        if result.problems:
            damaged += 1
            print(f"{step_folder}: DAMAGED: {'; '.join(result.problems[:SHOWN])}", flush=True)
        else:
            what = f"{result.num_tensors:,} tensors, {_size(result.num_bytes)}"
            print(f"{step_folder}: whole ({what})", flush=True)
    return 1 if damaged else 0


def _steps(place: Path) -> list[Path]:
    return sorted(entry.path for entry in folders.scan(place))


def prune(path: Path, overrides: Sequence[str], *, really: bool) -> int:
    """Say what the run's rules would delete; delete it if that is ``really`` meant."""
    place = _place(path)
    keep = keep_of(place, overrides)
    with run_lock(place.parent):  # a run that is at work prunes by itself
        surplus = folders.surplus(place, keep, None)
        surplus += sorted(place.glob("step_*.tmp-*"))
        for step_folder in surplus:
            size = _size(_bytes_in(step_folder))
            print(f"{'deleted' if really else 'would delete'} {step_folder} ({size})")
            if really:
                folders.remove(step_folder)
    if not surplus:
        print("nothing to delete")
    elif not really:
        print("nothing is deleted yet: give --yes, too")
    return 0


def show_differences(first: Path, second: Path, shown: int) -> int:
    """Print which tensors and which keys of the configurations differ. Returns 1 where tensors do,
    as diff does."""
    a, b = read_manifest(first), read_manifest(second)
    print(f"{first} (step {a.step}) and {second} (step {b.step})")
    configs = [upgraded(manifest.extras.get("config", {})) for manifest in (a, b)]
    for change in changes(*configs):
        print(f"config: {change}")
    rows = [("tensor", "shape", "largest", "relative")]
    count, equal = 0, len(a.tensors.keys() & b.tensors.keys())
    for found in differences(a, b):
        count += 1
        equal -= found.name in a.tensors and found.name in b.tensors
        if count <= shown:
            sizes = ("", "")
            if found.largest is not None and found.relative is not None:
                sizes = (f"{found.largest:.3g}", f"{found.relative:.3g}")
            rows.append((found.name, found.what, *sizes))
    if not count:
        print(f"all {len(a.tensors):,} tensors are equal")
        return 0
    more = f"\n... and {count - shown:,} more" if count > shown else ""
    show(f"{_table(rows)}{more}\n{count:,} tensors differ, {equal:,} are equal")
    return 1


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in _files(folder))


def _files(folder: Path) -> Iterable[Path]:
    return (file for file in folder.iterdir() if file.is_file())


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
