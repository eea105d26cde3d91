"""What a search has found, for JSON, for a screen, and as a configuration file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnres_train.config.yaml_text import block
from attnres_train.planning.estimate import Step
from attnres_train.planning.grids import AXES, Grid
from attnres_train.planning.search import Found, Loser
from attnres_train.planning.text import bytes_text, table

_CAUSES = {
    "computation": ("projections", "experts", "attention", "recurrence"),
    "the memory's bandwidth": ("memory",),
    "kernel launches": ("launches",),
    "the experts' exchange": ("expert exchange",),
    "the tensor exchange": ("tensor exchange",),
    "the context exchange": ("context exchange",),
    "idle stages": ("idle",),
    "gradients and parameters on their way": ("gradients", "parameters"),
    "the optimizer": ("optimizer",),
}
"""What a step can be bound by -> the parts of its time."""


_SHORT = {key: axis for axis, key in AXES.items()}
_SHOWN = 3
"""Losers of an axis on a screen, the nearest first."""


def as_report(found: Found) -> dict[str, Any]:
    """Ready for JSON. Sizes in bytes, times in seconds; all predicted."""
    config, device = found.estimator.config, found.estimator.device
    return {
        "run": config.run.name,
        "gpus": found.best[0].stage * found.best[0].pipeline,
        "device": asdict(device),
        "considered": found.considered,
        "fitting": found.fitting,
        "best": [of_grid(found, grid) for grid in found.best],
        "losers": [_loser(found, one) for one in found.losers],
        "refused": refused(found),
        "config": found.best[0].sections(),
    }


def refused(found: Found) -> list[dict[str, Any]]:
    """What was not looked at, and why."""
    return [
        {"what": what, "count": count, "example": found.refused.examples[what]}
        for what, count in sorted(found.refused.counts.items())
    ]


def of_grid(found: Found, grid: Grid) -> dict[str, Any]:
    """What is predicted of ``grid``, one of those of which ``found`` has the steps."""
    estimator, step = found.estimator, found.steps[grid]
    gpus = grid.stage * grid.pipeline
    return {
        "grid": grid._asdict(),
        "micro_batches": estimator.micro_batches(grid),
        "seconds": step.seconds,
        "tokens_per_second_per_gpu": estimator.tokens_per_step / step.seconds / gpus,
        "mfu": estimator.mfu(grid, step.seconds),
        "memory": estimator.memory(grid),
        "bytes": estimator.sent(grid),
        "parts": step.parts,
        "causes": _causes(step),
    }


def _causes(step: Step) -> dict[str, float]:
    """Shares of a step, the largest first."""
    shares = {
        cause: sum(step.parts[part] for part in parts) / step.seconds
        for cause, parts in _CAUSES.items()
    }
    return dict(sorted(shares.items(), key=lambda one: -one[1]))


def _loser(found: Found, loser: Loser) -> dict[str, Any]:
    winner, grid = found.steps[found.best[0]], loser.grid
    slower = loser.step.seconds / winner.seconds - 1 if loser.step else None
    return {
        "key": AXES[loser.axis],
        "value": getattr(grid, loser.axis),
        "grid": grid._asdict(),
        "memory": loser.memory,
        "slower": slower,
        "why": _why(found, loser, winner),
    }


def _why(found: Found, loser: Loser, winner: Step) -> str:
    device = found.estimator.device
    if loser.step is None:
        over = loser.memory - device.usable_memory
        return f"does not fit, {gigabytes(over)} GB too much"
    ours, theirs = (
        {cause: share * step.seconds for cause, share in _causes(step).items()}
        for step in (winner, loser.step)
    )
    cause = max(theirs, key=lambda one: (theirs[one] - ours[one], one))
    share = theirs[cause] / loser.step.seconds
    return f"more of {cause}: {share:.0%} of its step"


def as_text(report: Mapping[str, Any], yaml: str) -> str:
    """The report on a screen, with the winner's configuration."""
    parts = [head(report), _best(report), _first(report), _losers(report), _refused(report), yaml]
    return "\n\n".join(filter(None, parts))


def head(report: Mapping[str, Any]) -> str:
    """What was searched on what."""
    device = report["device"]
    return (
        f"{report['run']} on {report['gpus']} x {device['name']} ({gigabytes(device['memory'])} "
        f"GB, {device['peak_flops'] / 1e12:g} TFLOP/s, {device['node_size']} a node): "
        f"{report['fitting']:,} of {report['considered']:,} settings looked at are candidates.\n"
        "All figures are predictions from assumed efficiencies (--json lists them, --assume "
        "changes them)."
    )


def _best(report: Mapping[str, Any]) -> str:
    memory = report["device"]["memory"]
    rows = [
        (
            number,
            str(Grid(**one["grid"])),
            one["grid"]["layout"],
            one["grid"]["micro_batch"],
            one["grid"]["recompute"],
            f"needs {gigabytes(one['memory']['total'])} of {gigabytes(memory)} GB",
            f"{one['seconds']:.3g} s",
            f"{one['tokens_per_second_per_gpu']:,.0f}",
            f"{one['mfu']:.1%}",
        )
        for number, one in enumerate(report["best"], 1)
    ]
    header = ("", "grid", "layout", "batch", "recompute", "memory", "step", "tokens/s/GPU", "MFU")
    return table("Best", header, rows, left=3)


def _first(report: Mapping[str, Any]) -> str:
    first = report["best"][0]
    memory = [f"{name} {bytes_text(size)}" for name, size in first["memory"].items()]
    sent = [f"{group} {bytes_text(size)}" for group, size in first["bytes"].items() if size]
    bound, *more = [
        f"{cause} {share:.0%}" for cause, share in first["causes"].items() if share > 0.005
    ]
    return "\n".join(
        [
            f"The first is bound by {bound}; then {', '.join(more) or 'nothing'}.",
            f"  memory of the fullest rank: {', '.join(memory)}".replace("_", " "),
            f"  sent by a rank per step: {', '.join(sent) or 'nothing'}",
        ]
    )


def _losers(report: Mapping[str, Any]) -> str:
    nearest: dict[str, list[dict]] = {}
    for one in sorted(report["losers"], key=_distance):
        nearest.setdefault(one["key"], []).append(one)
    rows = [
        (
            _SHORT[one["key"]],
            one["value"],
            f"{gigabytes(one['memory'])} GB",
            "-" if one["slower"] is None else f"{one['slower']:+.0%}",
            one["why"],
        )
        for key in AXES.values()
        for one in nearest.get(key, [])[:_SHOWN]
    ]
    header = ("instead", "", "memory", "step", "why it loses")
    return (
        table(
            "Other choices (the best with each; the nearest)", header, rows, left=1, last_left=True
        )
        if rows
        else ""
    )


def _distance(loser: Mapping[str, Any]) -> tuple[bool, float]:
    return loser["slower"] is None, loser["memory"] if loser["slower"] is None else loser["slower"]


def _refused(report: Mapping[str, Any]) -> str:
    lines = [f"  {one['what']}: {one['example'].split(': ')[0]}" for one in report["refused"]]
    return "\n".join(["Not looked at", *lines]) if lines else ""


def as_yaml(found: Found, source: str, folder: Path, overrides: Mapping[str, Any]) -> str:
    """A configuration file for ``folder`` that extends ``source`` with what was given on the
    command line (``overrides``, nested) and the winner's sizes."""
    report = of_grid(found, found.best[0])
    device = found.estimator.device
    base = os.path.relpath(source, folder) if os.path.exists(source) else source
    values: dict[str, Any] = {"extends": base, **overrides}
    for section, keys in found.best[0].sections().items():
        values[section] = {**values.get(section, {}), **keys}
    cause, share = next(iter(report["causes"].items()))
    gpus = found.best[0].stage * found.best[0].pipeline
    return (
        f"# For {gpus} x {device.name}, by `attnres-train plan --gpus {gpus} --device "
        f"{device.name}`: predicted {report['seconds']:.3g} s a\n"
        f"# step, {report['mfu']:.1%} MFU, {gigabytes(report['memory']['total'])} of "
        f"{gigabytes(device.memory)} GB, bound by {cause} ({share:.0%}).\n{block(values)}"
    )


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.0f}" if size >= 9.95e9 else f"{size / 1e9:.1f}"
