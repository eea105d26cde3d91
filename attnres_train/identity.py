"""What a run is: its configuration, tokenizer and data, and whether those of a checkpoint are those
of the run that is to go on from it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attnres_train.config.kinds import kind_of
from attnres_train.config.resume_table import REFUSED, Change, Effect, changes
from attnres_train.config.saved import saved_config, upgraded
from attnres_train.config.schema import RunConfig
from attnres_train.data.held_out import held_out_share
from attnres_train.data.prepare import Prepared
from attnres_train.data.samples import SAMPLES_VERSION
from attnres_train.errors import UserError

Extras = Mapping[str, Any]
"""What a checkpoint holds beside tensors: ``progress``, ``config`` and, of runs since there is one,
the `data_record` under ``data``."""

_INSISTED = {
    Effect.MODEL: "the weights go into another model as they are",
    Effect.DATA: "the next sample is number {samples:,} of the new order: some of the old order "
    "come again, others never",
    Effect.TOKENIZER: "token ids mean other text than the weights have learnt",
}


def data_record(config: RunConfig, prepared: Prepared) -> dict[str, Any]:
    """What the tokens of a run depend on, by content, as plain values for JSON."""
    path = prepared.tokenizer_path
    content = hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else None
    return {
        "tokenizer": {"kind": config.data.tokenizer.kind, "sha256": content, "eod": prepared.eod},
        "corpora": [
            {"key": s.key, "name": s.name, "digest": s.content, "weight": s.weight}
            for s in prepared.sources
        ],
        "num_tokens": prepared.num_tokens,
        "num_valid_tokens": prepared.num_valid_tokens,
        "seed": config.run.seed,
        "seq_length": config.train.seq_length,
        "split": list(config.data.split),
        "samples": SAMPLES_VERSION,
        "held_out": held_out_share(config),
    }


def nothing_left(config: RunConfig, path: Path, extras: Extras) -> str | None:
    """Why a run that resumes from ``path`` has nothing to train, and what to change; None if it
    has. Raises UserError where the run is beyond its end."""
    step, train = extras["progress"]["step"], config.train
    if step > train.train_iters:
        raise UserError(
            f"train.train_iters is {train.train_iters}, but {path} is at step {step}: raise it, or "
            "begin from an earlier checkpoint (checkpoint.resume=PATH)"
        )
    if step == train.train_iters:
        return f"finished at step {step} of {step}; raise train.train_iters to go on"
    if train.stop_after and step >= train.stop_after:
        return (
            f"stopped at step {step} of {train.train_iters}, as train.stop_after="
            f"{train.stop_after} says; raise it to go on"
        )
    return None


def compare(
    config: RunConfig,
    path: Path,
    extras: Extras,
    record: Mapping[str, Any] | None,
    *,
    goes_on: bool = True,
) -> list[str]:
    """Compare the run of checkpoint ``path`` with ``config`` and its `data_record` (None: not known
    yet, not compared). Returns what to tell, a line each; of the recipe if the run ``goes_on``.

    Raises UserError where model, tokenizer or order of the data are others, and
    `checkpoint.allow` does not name them.
    """
    progress, found = extras["progress"], []
    lines = []
    if "config" in extras:
        found += changes(upgraded(extras["config"]), config.model_dump(mode="json"))
    if record is not None and "data" in extras:
        found += list(_data_changes(extras["data"], record))
    elif record is not None and progress["samples"]:
        lines.append(f"{path} has no record of its tokenizer and data: they could not be compared")
    if not progress["samples"]:  # no position yet that an order could be another of
        found = [c if c.effect != Effect.DATA else _as_recipe(c) for c in found]
    refused = [change for change in found if change.effect in REFUSED]
    _refuse([c for c in refused if c.effect.value not in config.checkpoint.allow], path)
    for effect in dict.fromkeys(change.effect for change in refused):
        told = _INSISTED[effect].format(**progress)
        lines.append(f"checkpoint.allow: {_count(refused, effect)}; {told}")
    if not goes_on:
        return lines
    since = f"changed since step {progress['step']}: "
    told_changes = [str(c) for c in found if c.effect != Effect.NONE]
    told_changes += _rate(config, path, extras)
    indent = " " * len(since)
    lines += [f"{indent if i else since}{text}" for i, text in enumerate(told_changes)]
    return lines


def _as_recipe(change: Change) -> Change:
    return Change(change.key, change.before, change.after, Effect.RECIPE)


def _data_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    """What the records of data differ in, beside what their configurations do."""
    for name, shown in (("sha256", "content of the file"), ("eod", "end of document")):
        old, new = before["tokenizer"][name], now["tokenizer"][name]
        if old != new:
            key = f"data.tokenizer ({shown})"
            yield Change(key, _short(old), _short(new), Effect.TOKENIZER)
    old_corpora, new_corpora = before["corpora"], now["corpora"]
    for number in range(max(len(old_corpora), len(new_corpora))):
        old, new = (c[number] if number < len(c) else {} for c in (old_corpora, new_corpora))
        if old.get("digest") != new.get("digest"):
            name = new.get("name") or old.get("name")
            key = f"data.corpus.{number} (content of {name})"
            yield Change(key, _short(old.get("digest")), _short(new.get("digest")), Effect.DATA)
    # Of runs of before these were kept: 1, and what the split says.
    old, new = (record.get("samples", 1) for record in (before, now))
    if old != new:
        key = "samples (how documents are cut, shuffled and held out)"
        yield Change(key, f"version {old}", f"version {new}", Effect.DATA)
    old, new = (record.get("held_out") for record in (before, now))
    if None not in (old, new) and bool(old) != bool(new):
        key = "share held out for validation, 0 where train.eval_interval is 0,"
        yield Change(key, old, new, Effect.DATA)
    if before["num_tokens"] != now["num_tokens"]:
        yield Change("training tokens", before["num_tokens"], now["num_tokens"], Effect.DATA)


def _short(value: Any) -> Any:
    return value[:12] if isinstance(value, str) else value


def _count(refused: list[Change], effect: Effect) -> str:
    count = sum(change.effect == effect for change in refused)
    return f"another {effect.value} ({count} {'change' if count == 1 else 'changes'})"


def _refuse(refused: list[Change], path: Path) -> None:
    if not refused:
        return
    kinds = [e.value for e in REFUSED if any(change.effect == e for change in refused)]
    listing = "".join(f"\n  {change} ({change.effect.value})" for change in refused)
    raise UserError(
        f"{path} is of another {' and '.join(kinds)} than this configuration:{listing}\n"
        "Change them back, or begin a run of its own under another run.name. To go on all the "
        f"same: checkpoint.allow=[{','.join(kinds)}] (see docs/checkpoints.md)"
    )


def _rate(config: RunConfig, path: Path, extras: Extras) -> list[str]:
    """The jump of the learning rate, where there is one."""
    try:
        before = saved_config(extras["config"], path)
    except (KeyError, UserError):  # a class that is gone
        return []
    step = extras["progress"]["step"] + 1
    old, new = (
        kind_of(c, "lr_schedule.kind").learning_rate(step, c.optimizer.lr, c.train.train_iters)
        for c in (before, config)
    )
    return [f"learning rate of step {step} {old:.4g} -> {new:.4g}"] if old != new else []
