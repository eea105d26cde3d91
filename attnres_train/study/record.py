"""The record of a study: all that its reports are made of, small, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnres_train.errors import UserError
from attnres_train.study import results
from attnres_train.study.compute import model_flops_per_token
from attnres_train.study.settings import label_of
from attnres_train.study.study_file import Study

FORMAT = 1


def record_of(study: Study) -> dict[str, Any]:
    """What the runs that have ended have measured. The same however often the study was stopped,
    but for `times`. Raises UserError where none has ended."""
    settings = study.settings
    ended, missing = [], []
    for run in study.runs:
        if (result := results.read_result(study, run)) is None:
            missing.append(run.name)
        else:
            ended.append({**result, "model_flops_per_token": model_flops_per_token(run.config)})
    if not ended:
        raise UserError(f"{study.folder} holds no run that has ended: start the study first")
    return {
        "format": FORMAT,
        "study": settings.study.name,
        "axes": {axis.name: list(map(label_of, axis.values)) for axis in settings.axes},
        "report": settings.report.model_dump(),
        "runs": ended,
        "missing": missing,
    }


def write_record(record: Mapping[str, Any], path: Path) -> None:
    """Raises UserError where that cannot be."""
    try:
        path.write_text(as_json(record), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}") from error


def as_json(record: Mapping[str, Any]) -> str:
    """A line for each run, so that records can be compared as text."""
    head = {key: value for key, value in record.items() if key != "runs"}
    runs = ",\n".join(json.dumps(run) for run in record["runs"])
    return f'{json.dumps(head, indent=1)[:-2]},\n "runs": [\n{runs}\n ]\n}}\n'


def read_record(path: Path) -> dict[str, Any]:
    """Raises UserError for what is none, or of a later time."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["format"]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no record of a study (study report --json FILE)") from None
    if version != FORMAT:
        raise UserError(f"{path} is a record of format {version}; this version reads {FORMAT}")
    return record
