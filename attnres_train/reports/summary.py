"""What one run did, in lines."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from attnres_train.checkpoint.folders import find_latest
from attnres_train.config.resume_table import TOLD, changes
from attnres_train.config.saved import saved_values
from attnres_train.config.schema import RunConfig
from attnres_train.config.stages import called
from attnres_train.observe.observer import Record
from attnres_train.planning.build import build_plan
from attnres_train.reports.measures import by_corpus


def summary(
    config: RunConfig, records: list[Record], info: dict, run: Path
) -> list[tuple[str, str]]:
    """(label, text) rows of the summary; losses in nats per token. ``info`` is what is known of the
    run's model and data, empty where the file is gone."""
    first, last = records[0], records[-1]
    validated = [r for r in records if "validation_loss" in r]
    parameters = f"{info['num_parameters']:,} parameters, " if "num_parameters" in info else ""
    corpus = f" of a corpus of {info['num_tokens']:,}" if "num_tokens" in info else ""
    rows = [
        ("run", f"{run}: {_stands(config, int(last['step']))}"),
        *_stages(config, int(last["step"])),
        ("model", f"{parameters}residual {config.model.residual.kind}"),
        ("tokens", f"{last['tokens']:,}{corpus}"),
        ("loss", f"{first['loss']:.4f} at step {first['step']}, {last['loss']:.4f} at the last"),
    ]
    if "unigram_entropy" in info:
        entropy = info["unigram_entropy"]
        rows.append(("unigram", f"{entropy:.4f} is the entropy of single corpus tokens"))
    if validated:
        rows.append(("validation", f"{validated[-1]['validation_loss']:.4f}"))
        rows += [("", f"{loss:.4f} of {label}") for label, loss in by_corpus(validated[-1]).items()]
    speed = statistics.median(r["tokens_per_second"] for r in records)
    seconds = sum(r["step_seconds"] for r in records)
    rows.append(("speed", f"{speed:,.0f} tokens/s (median), {seconds:.0f} s in steps"))
    rows.append(("memory", f"{last['memory_bytes'] / 2**30:.2f} GiB at its peak"))
    rows.append(("sent", _traffic(config, sum(r["p2p_bytes"] for r in records))))
    if newest := find_latest(run / "checkpoints"):
        rows.append(("checkpoint", str(newest)))
    rows += [("changed" if i == 0 else "", text) for i, text in enumerate(changed(run))]
    if (run / "loss.png").is_file():
        rows.append(("loss plot", str(run / "loss.png")))
    return rows


def _stands(config: RunConfig, step: int) -> str:
    end = config.total_iters
    if step > end:  # a folder of before a run could not be ended twice
        return f"step {step}, beyond train.train_iters {end}"
    return f"step {step} of {end}{', finished' if step == end else ''}"


def _stages(config: RunConfig, step: int) -> Iterator[tuple[str, str]]:
    """The row of each stage, in the run of ``config`` that has made ``step`` steps."""
    began = 0
    for number, stage in enumerate(config.stages):
        end = began + stage.train.train_iters
        stands = "over" if step >= end else "under way" if step > began else "to come"
        words = f"{called(config, number)}: steps {began + 1:,} to {end:,}, {stands}"
        yield "" if number else "stages", words
        began = end


def changed(run: Path) -> list[str]:
    """What was changed while the run in ``run`` went on, a line per change."""
    entries = sorted((run / "history").glob("step_*.yaml"))
    configs = [(_step_of(path), saved_values(path)) for path in entries]
    found = [
        (step, str(change))
        for (_, before), (step, after) in pairwise(configs)
        for change in changes(before, after)
        if change.effect in TOLD
    ]
    for path in sorted((run / "history").glob("step_*.json")):
        lines = json.loads(path.read_text(encoding="utf-8"))["data"]
        found += [(_step_of(path), line) for line in lines]
    return [f"{text} after step {step}" for step, text in sorted(found, key=lambda one: one[0])]


def _step_of(entry: Path) -> int:
    return int(entry.stem.removeprefix("step_"))


def _traffic(config: RunConfig, sent: float) -> str:
    units = build_plan(config).units()
    if not units.exact:
        return "nothing between stages: one stage"
    naive = sent * units.naive / units.exact
    return (
        f"{_size(sent)} between stages; the full history on every hop would have been "
        f"{_size(naive)} ({naive / sent:.2f}x)"
    )


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
