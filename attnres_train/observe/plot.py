"""The loss curve of a run as a picture."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from attnres_train.observe.observer import Observer
from attnres_train.observe.sinks import read_records


class LossPlot(Observer):
    """Draws ``loss.png`` from ``metrics.jsonl`` when the run ends; silent without matplotlib."""

    def on_end(self) -> None:
        folder, entropy = self.run.folder, self.run.info.unigram_entropy
        draw_loss(folder / "metrics.jsonl", folder / "loss.png", entropy)


def draw_loss(metrics: Path, picture: Path, unigram_entropy: float | None = None) -> bool:
    """Draw training and validation loss (nats per token) over steps. Returns whether it could."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    records = read_records(metrics)
    if not records:
        return False
    borders = [b["step"] for a, b in pairwise(records) if a.get("stage") != b.get("stage")]
    validated = [r for r in records if "validation_loss" in r]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], label="training")
    for number, border in enumerate(borders):
        axes.axvline(border, color="gray", linewidth=0.8, label=None if number else "next stage")
    if validated:
        steps, losses = zip(*[(r["step"], r["validation_loss"]) for r in validated], strict=True)
        axes.plot(steps, losses, "o-", label="validation")
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color="gray", linestyle="--", label="unigram entropy")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=metrics.parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)
    return True
