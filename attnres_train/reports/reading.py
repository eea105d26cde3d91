"""Run folders as a report takes them: what is there of a run, of any age, also while it runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnres_train.config.saved import saved_values
from attnres_train.errors import UserError
from attnres_train.observe.observer import Record
from attnres_train.observe.sinks import METRICS, read_records
from attnres_train.supervise.run_lock import is_locked

_WEIGHT = 0.9  # of the mean so far, where a record has no smoothed loss of its own


@dataclass(frozen=True)
class Run:
    """A run folder, read once. What is not there is empty."""

    folder: Path
    label: str
    """As short as tells it from the others."""
    values: dict[str, Any] = field(default_factory=dict)
    """Its configuration, plain, with the keys of now."""
    records: list[Record] = field(default_factory=list)
    """By step, each with a ``smoothed_loss`` (nats per token)."""
    info: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Texts written on the way: ``step``, ``prompt``, ``text``."""
    is_running: bool = False


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in ``folders``, each once. Raises UserError where a folder is not there."""
    once: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such run folder")
        once.setdefault(folder.resolve(), folder)
    labels = _labels(list(once))
    return [_read(folder, label) for folder, label in zip(once.values(), labels, strict=True)]


def _labels(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell all apart."""
    for length in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        labels = [str(Path(*path.parts[-length:])) for path in paths]
        if len(set(labels)) == len(labels):
            break
    return labels if paths else []


def _read(folder: Path, label: str) -> Run:
    config = folder / "config.yaml"
    try:
        values = saved_values(config) if config.is_file() else {}
    except UserError:  # no YAML, e.g. cut off
        values = {}
    return Run(
        folder,
        label,
        values,
        smoothed([r for r in _records(folder) if "step" in r]),
        _json(folder / "info.json"),
        _json(folder / "environment.json"),
        [s for s in _lines(folder / "samples.jsonl") if {"step", "prompt", "text"} <= s.keys()],
        is_locked(folder),
    )


def _records(folder: Path) -> list[Record]:
    try:
        return read_records(folder / METRICS)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / METRICS} cannot be read: {error}") from error


def smoothed(records: Sequence[Record]) -> list[Record]:
    """The ``records`` with a ``smoothed_loss``: their own, or else the exponential mean over steps,
    without the bias of its beginning. Losses that are not finite are passed over."""
    done, mean, weight = [], 0.0, 0.0
    for record in records:
        loss = record.get("loss", math.nan)
        if math.isfinite(loss):
            mean = _WEIGHT * mean + (1 - _WEIGHT) * loss
            weight = _WEIGHT * weight + 1 - _WEIGHT
        own = mean / weight if weight else math.nan
        done.append({"smoothed_loss": own} | record)
    return done


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of ``path``, a line each, up to one that is cut off."""
    found: list[dict[str, Any]] = []
    try:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            found.append(json.loads(line))
    except (OSError, ValueError):
        pass
    return [line for line in found if isinstance(line, dict)]
