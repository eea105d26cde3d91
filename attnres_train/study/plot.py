"""Pictures of a study: the difference from the baseline over tokens, and loss over compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnres_train.errors import UserError
from attnres_train.study.analysis import Analysis, Group
from attnres_train.study.scaling import Scaling, scalings
from attnres_train.study.tables import named, percent


def draw(analysis: Analysis, path: Path) -> None:
    """Write the picture, in the form that the ending of ``path`` names. Raises UserError without
    matplotlib, and where it cannot be written."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install 'attnres-train[plot]'") from error
    groups = [group for group in analysis.groups if group.tuned]
    laws = [one for one in scalings(analysis) if one.fits]
    panels = 2 * len(groups) + len(laws)
    if not panels:
        raise UserError("--plot: there is nothing to compare yet")
    rows = len(groups) + -(-len(laws) // 2)
    figure = Figure(figsize=(11, 3.8 * rows), layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False)
    for axes, group in zip(grid, groups, strict=False):
        _losses(axes[0], analysis, group)
        _courses(axes[1], analysis, group)
    free = grid[len(groups) :].ravel().tolist()
    for axes, scaling in zip(free, laws, strict=False):
        _laws(axes, scaling)
    for axes in free[len(laws) :]:
        axes.set_axis_off()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: {error}") from error


def _losses(axes: Any, analysis: Analysis, group: Group) -> None:
    for number, (kind, cell) in enumerate(group.best.items()):
        for pair in cell.values:
            run = analysis.run(group.labels, kind, cell.tuned, pair)
            assert run is not None
            curve = sorted(analysis.curve(run).items())
            tokens, losses = zip(*curve, strict=True)
            first = pair == next(iter(cell.values))
            label = f"{kind} {cell.tuned}".strip() if first else None
            axes.plot(tokens, losses, color=f"C{number}", alpha=0.7, linewidth=1, label=label)
    axes.set(xlabel="tokens", ylabel=analysis.report["metric"], title=named(group.labels))
    axes.grid(alpha=0.3)
    axes.legend()


def _courses(axes: Any, analysis: Analysis, group: Group) -> None:
    for number, comparison in enumerate(group.tuned):
        course = analysis.course(group, comparison)
        tokens = [count for count, _ in course]
        means = [one.mean for _, one in course]
        color = f"C{number + 1}"
        axes.plot(tokens, means, "o-", color=color, label=comparison.kind, markersize=3)
        if course[0][1].student is not None:
            low, high = zip(*[one.student for _, one in course if one.student], strict=True)
            axes.fill_between(tokens, low, high, color=color, alpha=0.15)
    axes.axhline(0, color="gray", linewidth=0.8)
    title = f"difference from {analysis.baseline}, {percent(analysis)} interval (t)"
    axes.set(xlabel="tokens", ylabel="nats", title=title)
    axes.grid(alpha=0.3)
    axes.legend()


def _laws(axes: Any, scaling: Scaling) -> None:
    for number, (kind, one) in enumerate(scaling.fits.items()):
        compute, losses = zip(*scaling.points[kind], strict=True)
        low, high = min(compute), max(compute)
        line = [low * (high / low) ** (n / 50) for n in range(51)]
        axes.plot(compute, losses, "o", color=f"C{number}", label=kind)
        axes.plot(line, [one.law.loss(c) for c in line], color=f"C{number}", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="PFLOP/s-days", ylabel="loss")
    axes.set_title(named(scaling.labels))
    axes.grid(alpha=0.3, which="both")
    axes.legend()
