"""Curves of runs over each other, and what each has observed, as pictures, by matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from attnres_train.errors import UserError
from attnres_train.observe import pictures
from attnres_train.reports.curves import loss_curves, time_axis, token_axis
from attnres_train.reports.reading import Run

SUFFIXES = (".png", ".svg", ".pdf")


def draw_plot(runs: Sequence[Run], path: Path) -> None:
    """Write ``path``: losses (nats per token) against tokens and against time; lines: smoothed,
    dots: validation. Raises UserError without matplotlib, and where ``path`` cannot be written."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--plot {path}: name a file that ends in {', '.join(SUFFIXES)}")
    _check_matplotlib(f"--plot {path}")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, axis in zip(panels, (token_axis(runs), time_axis(runs)), strict=True):
        for curve in loss_curves(runs, axis):
            color = f"C{curve.run % 10}"
            xs, ys, lows, highs = zip(*curve.points, strict=True)
            axes.plot(xs, ys, color=color, label=runs[curve.run].label)
            axes.fill_between(xs, lows, highs, color=color, alpha=0.2, linewidth=0)
            if curve.marks:
                axes.plot(*zip(*curve.marks, strict=True), "o", color=color, markersize=4)
        unit = f" ({axis.unit})" if axis.unit else ""
        axes.set(xlabel=axis.label + unit)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="loss (nats per token)")
    if any(run.records for run in runs):
        panels[0].legend()
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"--plot {path}: {error.strerror}") from error


def save_pictures(runs: Sequence[Run], folder: Path) -> None:
    """The pictures of each run's latest observation, as ``folder``/<run's label>/<picture>.png.
    Raises UserError where no run has any, without matplotlib, and where they cannot be written."""
    _check_matplotlib(f"--pictures {folder}")
    found = {run.label: pictures.pictures(run.folder) for run in runs}
    if not any(found.values()):
        names = ", ".join(str(run.folder) for run in runs)
        raise UserError(
            f"--pictures {folder}: nothing was observed in {names}: a run with observe.interval "
            "has observations, and `attnres-train inspect RUN` makes them from a checkpoint"
        )
    try:
        for label, figures in found.items():
            if figures:
                pictures.save(figures, folder / label)
    except OSError as error:
        raise UserError(f"--pictures {folder}: {error.strerror}") from error


def _check_matplotlib(option: str) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"{option} needs matplotlib: pip install 'attnres-train[plot]'")
