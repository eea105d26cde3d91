"""What a study keeps of each of its runs: a small file of JSON, from which every report is made.

A run has ended when its result is there. It is written at once, by a rename, after the run's last
step: whatever happens to the study before, the run is resumed, and gives the same result.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnres_train.config.loader import plain_values, save_config
from attnres_train.config.resume_table import TOLD, Change, changes
from attnres_train.config.saved import saved_values
from attnres_train.errors import UserError
from attnres_train.observe.observer import Record
from attnres_train.observe.sinks import METRICS, read_records
from attnres_train.study.study_file import Study, StudyRun

Result = dict[str, Any]
CURVE_POINTS = 200
"""Of the training loss, at most."""
MEASURED = ("validation_loss", "validation_bits_per_byte")
"""Keys of records; with ``/<corpus>`` behind them those of each corpus of a mixture."""
_ALSO = ("model.initializer_range",)
"""Keys without an effect on a run that goes on, but on one that begins."""


def run_folder(study: Study, run: StudyRun) -> Path:
    return study.folder / "runs" / run.name


def config_file(study: Study, run: StudyRun) -> Path:
    return study.folder / "configs" / f"{run.name}.yaml"


def result_file(study: Study, run: StudyRun) -> Path:
    return study.folder / "results" / f"{run.name}.json"


def log_file(study: Study, run: StudyRun) -> Path:
    return study.folder / "logs" / f"{run.name}.log"


def check_same(study: Study) -> None:
    """Raise UserError where a run of the study's folder was begun with another configuration than
    it has now: a report would mix the two."""
    told = []
    for run in study.runs:
        if (path := config_file(study, run)).is_file():
            found = changes(saved_values(path), plain_values(run.config))
            told += [f"{run.name}: {change}" for change in found if _counts(change)]
    if told:
        more = f"\n  and {len(told) - 8} more" if len(told) > 8 else ""
        raise UserError(
            f"study.name: {study.folder} holds runs of another study, or of this one before it was "
            "changed:\n  " + "\n  ".join(told[:8]) + more + "\nGive study.name another name, or "
            "delete that folder"
        )


def _counts(change: Change) -> bool:
    return change.effect in TOLD or change.key in _ALSO


def write_config(study: Study, run: StudyRun) -> Path:
    """The file with which the run is started: whole, so that it needs no other."""
    path = config_file(study, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    save_config(run.config, partial)
    partial.replace(path)
    return path


def read_result(study: Study, run: StudyRun) -> Result | None:
    """None: the run has not ended."""
    path = result_file(study, run)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def keep_result(study: Study, run: StudyRun) -> Result | None:
    """Write the result of a run that has made its last step; None where it has not."""
    folder = run_folder(study, run)
    records = read_records(folder / METRICS)
    if not records or records[-1]["step"] < run.config.total_iters:
        return None
    info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
    result = result_of(run, records, info)
    path = result_file(study, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(result) + "\n", encoding="utf-8")
    partial.replace(path)
    return result


def tidy(study: Study, run: StudyRun) -> None:
    """What a run that has ended does not keep."""
    if not study.settings.study.keep_checkpoints:
        shutil.rmtree(run_folder(study, run) / "checkpoints", ignore_errors=True)


def result_of(run: StudyRun, records: Sequence[Record], info: Result) -> Result:
    """Of a run's records, one per step. Losses in nats per token; `times` alone depends on the
    machine and on what else it did."""
    last = records[-1]
    keys = dict.fromkeys(key for r in records for key in r if key.partition("/")[0] in MEASURED)
    curves = {key: [[r["tokens"], _json(r[key])] for r in records if key in r] for key in keys}
    count = min(len(records), CURVE_POINTS)
    shown = [records[(len(records) - 1) * n // max(1, count - 1)] for n in range(count)]
    return {
        "run": run.name,
        "labels": dict(run.labels),
        "seed": run.config.run.seed,
        "parameters": info["num_parameters"],
        "steps": last["step"],
        "tokens": last["tokens"],
        "corpus_tokens": info["num_tokens"],
        "unigram_entropy": info["unigram_entropy"],
        "curves": curves,
        "training_loss": [[r["tokens"], _json(r["loss"])] for r in shown],
        "times": {
            "step_seconds": statistics.median(r["step_seconds"] for r in records),
            "tokens_per_second": statistics.median(r["tokens_per_second"] for r in records),
            "seconds": sum(r["step_seconds"] for r in records),
            "memory_bytes": max(r["memory_bytes"] for r in records),
        },
    }


def _json(value: float) -> float | None:
    """JSON has no word for what is not finite."""
    return round(value, 6) if math.isfinite(value) else None


def reached(study: Study, run: StudyRun) -> str:
    """How far a run that has not ended is, in words."""
    records = read_records(run_folder(study, run) / METRICS)
    step = int(records[-1]["step"]) if records else 0
    return f"at step {step} of {run.config.total_iters}" if step else "before its first step"
