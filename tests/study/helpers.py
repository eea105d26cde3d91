"""A small study, its queue with the stand-in for training, and synthetic records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny import write_config

STUDY = """
study: {{name: small, dir: {folder}/studies}}
base: tiny.yaml
set:
  train.train_iters: 4
  checkpoint: {{keep_last: 1}}
axes:
  - name: kind
    values:
      standard: {{model.residual.kind: standard}}
      static: {{model.residual: {{kind: block, scores: bias}}}}
  - {{name: lr, key: optimizer.lr, values: [5e-3, 1e-2]}}
  - {{name: seed, key: run.seed, values: [1, 2]}}
report: {{compare: kind, baseline: standard, pair: seed, tune: lr}}
"""


def write_study(folder: Path, text: str = STUDY) -> Path:
    write_config(folder)
    path = folder / "study.yaml"
    path.write_text(text.format(folder=folder), encoding="utf-8")
    return path


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    runs = [{k: v for k, v in run.items() if k != "times"} for run in record["runs"]]
    return record | {"runs": runs}


def synthetic(
    losses: Callable[[dict[str, str], int], float | None],
    axes: dict[str, list[str]],
    flops: Callable[[dict[str, str]], float] = lambda labels: 1e9,
    **report: Any,
) -> dict[str, Any]:
    """A record of runs whose validation loss at 100, 200 and 300 tokens is ``losses(labels,
    tokens)``."""
    runs = []
    grid = np.stack(np.meshgrid(*axes.values(), indexing="ij"), -1).reshape(-1, len(axes))
    for row in grid.tolist():
        labels = dict(zip(axes, row, strict=True))
        curve = [[tokens, losses(labels, tokens)] for tokens in (100, 200, 300)]
        times = {"step_seconds": 0.1, "tokens_per_second": 1000, "seconds": 9, "memory_bytes": 1}
        runs.append(
            {
                "run": ",".join(row),
                "labels": labels,
                "tokens": 300,
                "steps": 3,
                "model_flops_per_token": flops(labels),
                "curves": {"validation_loss": curve},
                "training_loss": curve,
                "times": times,
            }
        )
    parts = {"compare": "kind", "baseline": None, "pair": None, "tune": None, "fit": None}
    parts |= {"fit_floor": False, "metric": "validation_loss", "take": "final", "confidence": 0.95}
    head = {"format": 1, "study": "made up", "axes": axes, "missing": []}
    return {**head, "report": parts | report, "runs": runs}
