"""What a search has found for a run in stages, for JSON, for a screen, and as a configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnres_train.config.tree import Tree
from attnres_train.config.yaml_text import block
from attnres_train.planning.advice import gigabytes, head, of_grid, refused
from attnres_train.planning.grids import Grid
from attnres_train.planning.stage_search import FoundStages
from attnres_train.planning.text import table


def as_report(found: FoundStages) -> dict[str, Any]:
    """Ready for JSON. Sizes in bytes, times in seconds; all predicted."""
    first = found.stages[0]
    names = [stage.name for stage in found.config.stages]
    return {
        "run": found.config.run.name,
        "gpus": first.best[0].stage * first.best[0].pipeline,
        "device": asdict(first.estimator.device),
        "considered": sum(stage.considered for stage in found.stages),
        "fitting": sum(stage.fitting for stage in found.stages),
        "best": [_way(found, number) for number in range(len(first.best))],
        "alone": {
            name: of_grid(stage, grid)
            for name, stage, grid in zip(names, found.stages, found.alone, strict=True)
        },
        "refused": {name: refused(stage) for name, stage in zip(names, found.stages, strict=True)},
        "config": sections(found),
    }


def _way(found: FoundStages, number: int) -> dict[str, Any]:
    return {
        "seconds": found.seconds(number),
        "stages": {
            stage.name: {
                "steps": stage.train.train_iters,
                "share": seconds / found.seconds(number),
                **of_grid(of_stage, of_stage.best[number]),
            }
            for stage, of_stage, seconds in zip(
                found.config.stages, found.stages, found.of_stages(number), strict=True
            )
        },
    }


def sections(found: FoundStages) -> dict[str, Any]:
    """The keys that the first way sets: the grid's, and each stage's under its number."""
    grids = [stage.best[0] for stage in found.stages]
    return {
        "parallel": grids[0].sections()["parallel"],
        "stages": {number: {"train": g.sections()["train"]} for number, g in enumerate(grids)},
    }


def as_text(report: Mapping[str, Any], yaml: str) -> str:
    """The report on a screen, with the configuration of the first way."""
    parts = [head(report), _best(report), _stages(report), _refused(report), yaml]
    return "\n\n".join(filter(None, parts))


def _best(report: Mapping[str, Any]) -> str:
    names = list(report["best"][0]["stages"])
    rows = []
    for number, way in enumerate(report["best"], 1):
        stages = way["stages"]
        grid = stages[names[0]]["grid"]
        steps = [f"{stages[name]['seconds']:.3g} s" for name in names]
        rows.append((number, str(Grid(**grid)), grid["layout"], _duration(way["seconds"]), *steps))
    header = ("", "grid", "layout", "all stages", *(f"step of {name}" for name in names))
    return table("Best for all stages together", header, rows, left=3)


def _stages(report: Mapping[str, Any]) -> str:
    memory = gigabytes(report["device"]["memory"])
    rows = [
        (
            name,
            f"{one['steps']:,}",
            one["grid"]["micro_batch"],
            one["grid"]["recompute"],
            f"needs {gigabytes(one['memory']['total'])} of {memory} GB",
            f"{one['tokens_per_second_per_gpu']:,.0f}",
            f"{one['mfu']:.1%}",
            next(iter(one["causes"])),
            f"{one['share']:.0%}",
            _alone(one, report["alone"][name]),
        )
        for name, one in report["best"][0]["stages"].items()
    ]
    header = (
        *("stage", "steps", "batch", "recompute", "memory", "tokens/s/GPU", "MFU", "bound by"),
        *("of the time", "alone"),
    )
    return table("Every stage on the first", header, rows, left=1, last_left=True)


def _alone(one: Mapping[str, Any], alone: Mapping[str, Any]) -> str:
    """What a stage would do better by itself."""
    less = alone["seconds"] / one["seconds"] - 1
    if alone["grid"] == one["grid"] or less > -0.005:
        return "no better"
    return f"{less:+.0%}: {Grid(**alone['grid'])}"


def _refused(report: Mapping[str, Any]) -> str:
    lines = [
        f"  {name}, {one['what']}: {one['example'].split(': ')[0]}"
        for name, told in report["refused"].items()
        for one in told
    ]
    return "\n".join(["Not looked at", *lines]) if lines else ""


def as_yaml(found: FoundStages, source: str, folder: Path, given: Mapping[str, Any]) -> str:
    """A configuration file for ``folder`` that extends ``source`` with what is ``given``, nested:
    the overrides of the command line, and all `stages`; and the sizes of the first way."""
    device, first = found.stages[0].estimator.device, found.stages[0].best[0]
    base = os.path.relpath(source, folder) if os.path.exists(source) else source
    values = Tree({"extends": base, **given}, {})
    values.merge(Tree(sections(found), {}))
    gpus = first.stage * first.pipeline
    return (
        f"# For {gpus} x {device.name}, by `attnres-train plan --gpus {gpus} --device "
        f"{device.name}`: predicted {_duration(found.seconds(0))}\n"
        f"# for the {len(found.stages)} stages.\n{block(values.values)}"
    )


def _duration(seconds: float) -> str:
    for unit, size, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 72)):
        if seconds < size * most:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:.3g} days"
