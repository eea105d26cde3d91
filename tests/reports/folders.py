"""Run folders for reports, written by hand: what stands in them is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def record(step: int, loss: float | None, **more: Any) -> dict[str, Any]:
    """Of a step of two seconds and 100 tokens."""
    return {
        "step": step,
        "tokens": 100 * step,
        "loss": loss,
        "grad_norm": 1.0 / step,
        "lr": 1e-3,
        "tokens_per_second": 50.0,
        "step_seconds": 2.0,
        "memory_bytes": 2**30,
    } | more


def make_run(folder: Path, losses: list[float | None], config: str = "", end: str = "") -> Path:
    """A run with these losses, validated at every tenth step (the loss then, and 0.1); ``end`` is
    what comes after the last whole line."""
    folder.mkdir(parents=True)
    records = [record(n, loss) for n, loss in enumerate(losses, 1)]
    for one in records[9::10]:
        one["validation_loss"] = one["loss"] and one["loss"] + 0.1
    lines = "".join(json.dumps(one) + "\n" for one in records)
    (folder / "metrics.jsonl").write_text(lines + end)
    text = config or "train: {train_iters: 100}\n"
    (folder / "config.yaml").write_text(f"run: {{name: {json.dumps(folder.name)}}}\n{text}")
    (folder / "info.json").write_text(json.dumps({"num_parameters": 1234, "num_tokens": 5}))
    (folder / "environment.json").write_text(json.dumps({"packages": {"torch": "2.x"}}))
    return folder


def falling(number: int, first: float = 5.0) -> list[float | None]:
    return [first - 0.01 * n for n in range(number)]
