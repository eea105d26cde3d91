"""Curves of runs over each other as a picture, by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attnres_train.errors import UserError
from attnres_train.reports.curves import loss_curves, time_axis, token_axis
from attnres_train.reports.reading import Run

SUFFIXES = (".png", ".svg", ".pdf")


def draw_plot(runs: Sequence[Run], path: Path) -> None:
    """Write ``path``: losses (nats per token) against tokens and against time; lines: smoothed,
    dots: validation. Raises UserError without matplotlib, and where ``path`` cannot be written."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--plot {path}: name a file that ends in {', '.join(SUFFIXES)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            f"--plot {path} needs matplotlib: pip install 'attnres-train[plot]'"
        ) from error
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
