"""What a run has come to, in numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from attnres_train.observe.observer import Record
from attnres_train.reports.reading import Run


@dataclass(frozen=True)
class Measures:
    """None where a run has no such figure. Losses in nats per token, times in seconds."""

    run: str
    folder: str
    state: str
    """finished, running, stopped, or no steps."""
    step: int
    steps: int | None
    """Of the whole run."""
    residual: str | None
    parameters: int | None
    tokens: int | None
    loss: float | None
    """Of the last steps, smoothed."""
    best_validation_loss: float | None
    best_validation_step: int | None
    validation_loss: float | None
    """The last one."""
    bits_per_byte: float | None
    """With the last validation."""
    validation_by_corpus: dict[str, float]
    """The last validation loss of each corpus of a mixture, by its label."""
    tokens_per_second: float | None
    """Median over steps."""
    seconds: float | None
    """Spent in steps."""
    memory_bytes: float | None
    """Most that any step needed."""
    steps_not_finite: int
    """Those whose loss is no number."""

    @property
    def standing(self) -> str:
        """The state, and what went wrong on the way."""
        lost = self.steps_not_finite
        return self.state + (f", loss not finite in {lost:,} step{'s' * (lost != 1)}" * bool(lost))


def measures(run: Run) -> Measures:
    """Those of ``run``."""
    records = run.records
    last = records[-1] if records else {}
    step, steps = int(last.get("step", 0)), total_steps(run.values)
    validated = [r for r in records if math.isfinite(r.get("validation_loss", math.nan))]
    best = min(validated, key=lambda r: r["validation_loss"], default={})
    in_bytes = list(_finite(run, "validation_bits_per_byte"))
    speeds, memory = list(_finite(run, "tokens_per_second")), list(_finite(run, "memory_bytes"))
    smooth = list(_finite(run, "smoothed_loss"))
    return Measures(
        run=run.label,
        folder=str(run.folder),
        state=_state(run, step, steps),
        step=step,
        steps=steps,
        residual=_at(run.values, "model", "residual", "kind"),
        parameters=run.info.get("num_parameters"),
        tokens=int(last["tokens"]) if "tokens" in last else None,
        loss=smooth[-1] if smooth else None,
        best_validation_loss=best.get("validation_loss"),
        best_validation_step=int(best["step"]) if best else None,
        validation_loss=validated[-1]["validation_loss"] if validated else None,
        bits_per_byte=in_bytes[-1] if in_bytes else None,
        validation_by_corpus=by_corpus(validated[-1]) if validated else {},
        tokens_per_second=statistics.median(speeds) if speeds else None,
        seconds=sum(_finite(run, "step_seconds")) if records else None,
        memory_bytes=max(memory, default=None),
        steps_not_finite=sum(not math.isfinite(r.get("loss", 0.0)) for r in records),
    )


def by_corpus(record: Record, what: str = "validation_loss") -> dict[str, float]:
    """Of ``what`` in ``record`` what is of each corpus of a mixture, by its label."""
    parts = ((*key.partition("/"), value) for key, value in record.items())
    return {label: value for key, slash, label, value in parts if key == what and slash}


def _state(run: Run, step: int, steps: int | None) -> str:
    if steps is not None and step >= steps:
        return "finished"
    if run.is_running:
        return "running"
    return "stopped" if run.records else "no steps"


def total_steps(values: dict[str, Any]) -> int | None:
    """Of the run with the plain configuration ``values``, over its stages if it has some."""
    own = _at(values, "train", "train_iters")
    stages = _at(values, "stages") or []
    by_stage = [_at(stage, "train", "train_iters") or own for stage in stages]
    return sum(by_stage) if by_stage and all(by_stage) else own


def _at(values: Any, *keys: str) -> Any:
    """What stands there, None where nothing does."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _finite(run: Run, key: str) -> Iterator[float]:
    values = (record.get(key, math.nan) for record in run.records)
    return (value for value in values if math.isfinite(value))
