"""What a run is: its configuration, tokenizer and data, and whether those of a checkpoint are those
of the run that is to go on from it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attnres_train.config.kinds import kind_of
from attnres_train.config.loader import plain_values
from attnres_train.config.resume_table import REFUSED, TOLD, Change, Effect, changes
from attnres_train.config.saved import saved_config, upgraded
from attnres_train.config.schema import RunConfig
from attnres_train.data.held_out import held_out_share
from attnres_train.data.prepare import Prepared
from attnres_train.data.samples import SAMPLES_VERSION, Source
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
BEGINS_ANEW = "the data begin anew, at sample 0 of their new order"
RESTART = "If this is meant: data.new=restart goes on with these data from their beginning"
APPEND = ", data.new=append mixes new files into the rest of the epoch"


def data_record(config: RunConfig, prepared: Prepared) -> dict[str, Any]:
    """What the tokens of a run depend on, by content, as plain values for JSON."""
    path = prepared.tokenizer_path
    content = hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else None
    return {
        "tokenizer": {"kind": config.data.tokenizer.kind, "sha256": content, "eod": prepared.eod},
        "corpora": [
            {"key": source.key, "name": source.name, "weight": source.weight}
            | _files(source)
            | {"later": [{"start": one.start} | _files(one) for one in source.later]}
            for source in prepared.sources
        ],
        "num_tokens": prepared.num_tokens,
        "num_valid_tokens": prepared.num_valid_tokens,
        "seed": config.run.seed,
        "seq_length": config.train.seq_length,
        "split": list(config.data.split),
    } | _sampling(config)


def _sampling(config: RunConfig) -> dict[str, Any]:
    return {"samples": SAMPLES_VERSION, "held_out": held_out_share(config)}


def _files(source: Source) -> dict[str, Any]:
    return {"digest": source.content, "files": source.files, "num_files": source.num_files}


def nothing_left(config: RunConfig, path: Path, extras: Extras) -> str | None:
    """Why a run that resumes from ``path`` has nothing to train, and what to change; None if it
    has. Raises UserError where the run is beyond its end."""
    progress, train = extras["progress"], config.train
    step, began = progress["step"], progress.get("began", 0)
    end, since = began + train.train_iters, f", begun after step {began}," if began else ""
    if step > end:
        raise UserError(
            f"train.train_iters is {train.train_iters}{since}, but {path} is at step {step}: raise "
            "it, or begin from an earlier checkpoint (checkpoint.resume=PATH)"
        )
    if step == end:
        return f"finished at step {step} of {step}; raise train.train_iters to go on"
    if train.stop_after and step >= train.stop_after:
        return (
            f"stopped at step {step} of {config.total_iters}, as train.stop_after="
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
    progress, lines = extras["progress"], []
    found = _changes(config, extras, record)
    if record is not None and "data" not in extras and progress["samples"]:
        lines.append(f"{path} has no record of its tokenizer and data: they could not be compared")
    if begins_data_anew(config, extras, record):
        lines.append(f"data.new=restart: {BEGINS_ANEW}")
        found = [_as_recipe(change) for change in found]
    refused = [change for change in found if change.effect in REFUSED]
    refuse([c for c in refused if c.effect.value not in config.checkpoint.allow], path)
    for effect in dict.fromkeys(change.effect for change in refused):
        told = _INSISTED[effect].format(**progress)
        lines.append(f"checkpoint.allow: {_count(refused, effect)}; {told}")
    if not goes_on:
        return lines
    since = f"changed since step {progress['step']}: "
    told_changes = [str(c) for c in found if c.effect in TOLD]
    told_changes += _rate(config, path, extras)
    indent = " " * len(since)
    lines += [f"{indent if i else since}{text}" for i, text in enumerate(told_changes)]
    return lines


def begins_data_anew(config: RunConfig, extras: Extras, record: Mapping[str, Any] | None) -> bool:
    """Whether the run goes on with sample 0 of other data (`data.new: restart`)."""
    asked = config.data.new == "restart" and extras["progress"]["samples"]
    return bool(asked) and any(c.effect == Effect.DATA for c in _changes(config, extras, record))


def order_changes(config: RunConfig, extras: Extras) -> list[Change]:
    """What else than files makes the order of the data another: known before they are prepared."""
    found = [c for c in _changes(config, extras, None) if c.effect == Effect.DATA]
    return found + list(_sampling_changes(extras.get("data", {}), _sampling(config)))


def data_history(config: RunConfig, extras: Extras, record: Mapping[str, Any]) -> list[str]:
    """What becomes of the data of the run at this step, for its history: a line each."""
    told = [BEGINS_ANEW] if begins_data_anew(config, extras, record) else []
    if "data" in extras:
        told += [str(c) for c in _data_changes(extras["data"], record) if _is_of_files(c)]
    return told


def _is_of_files(change: Change) -> bool:
    return "(files of " in change.key or "(content of " in change.key


def _changes(config: RunConfig, extras: Extras, record: Mapping[str, Any] | None) -> list[Change]:
    """All that differs, whether it is refused or not."""
    found = []
    if "config" in extras:
        found += changes(upgraded(extras["config"]), plain_values(config))
    if record is not None and "data" in extras:
        found += list(_data_changes(extras["data"], record))
    if not extras["progress"]["samples"]:  # no position yet that an order could be another of
        found = [_as_recipe(change) for change in found]
    return found


def _as_recipe(change: Change) -> Change:
    """What becomes of a change of the data where there is no position in them."""
    effect = Effect.RECIPE if change.effect == Effect.DATA else change.effect
    return Change(change.key, change.before, change.after, effect)


def _data_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    """What the records of data differ in, beside what their configurations do."""
    for name, shown in (("sha256", "content of the file"), ("eod", "end of document")):
        old, new = before["tokenizer"][name], now["tokenizer"][name]
        if old != new:
            key = f"data.tokenizer ({shown})"
            yield Change(key, _short(old), _short(new), Effect.TOKENIZER)
    if "corpora" not in before:  # a stage that begins
        return
    old_corpora, new_corpora = before["corpora"], now["corpora"]
    grown = False
    for number in range(max(len(old_corpora), len(new_corpora))):
        old, new = (c[number] if number < len(c) else {} for c in (old_corpora, new_corpora))
        known, have = _generations(old), _generations(new)
        if known == have:
            continue
        name = new.get("name") or old.get("name")
        if known and have[: len(known)] == known:
            grown = True
            added = new["later"][-1]
            count = sum(one["num_files"] for one in (new, *new["later"][:-1]))
            now_there = (
                f"{count + added['num_files']} (the new from its sample {added['start']:,} on)"
            )
            key = f"data.corpus.{number} (files of {name})"
            yield Change(key, count, now_there, Effect.RECIPE)
        else:
            key = f"data.corpus.{number} (content of {name})"
            yield Change(key, _short(old.get("digest")), _short(new.get("digest")), Effect.DATA)
    yield from _sampling_changes(before, now)
    if before["num_tokens"] != now["num_tokens"] and not grown:
        yield Change("training tokens", before["num_tokens"], now["num_tokens"], Effect.DATA)


def _sampling_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    # Of runs of before these were kept: 1, and what the split says.
    old, new = (record.get("samples", 1) for record in (before, now))
    if old != new:
        key = "samples (how documents are cut, shuffled and held out)"
        yield Change(key, f"version {old}", f"version {new}", Effect.DATA)
    old, new = (record.get("held_out") for record in (before, now))
    if None not in (old, new) and bool(old) != bool(new):
        key = "share held out for validation, 0 where train.eval_interval is 0,"
        yield Change(key, old, new, Effect.DATA)


def _generations(corpus: Mapping[str, Any]) -> list[tuple[int, str]]:
    """(first sample, content) of the files of a corpus by when they came; [] of none."""
    if not corpus:
        return []
    return [(0, corpus["digest"]), *((g["start"], g["digest"]) for g in corpus.get("later", ()))]


def _short(value: Any) -> Any:
    return value[:12] if isinstance(value, str) else value


def _count(refused: list[Change], effect: Effect) -> str:
    count = sum(change.effect == effect for change in refused)
    return f"another {effect.value} ({count} {'change' if count == 1 else 'changes'})"


def refuse(refused: list[Change], path: Path) -> None:
    """Raise UserError for the changes of run ``path`` that are ``refused``, if any."""
    if not refused:
        return
    kinds = [e.value for e in REFUSED if any(change.effect == e for change in refused)]
    listing = "".join(f"\n  {change} ({change.effect.value})" for change in refused)
    way_on = ""
    if Effect.DATA.value in kinds:
        way_on = f"{RESTART}{APPEND if any(map(_is_of_files, refused)) else ''}. "
    raise UserError(
        f"{path} is of another {' and '.join(kinds)} than this configuration:{listing}\n{way_on}"
        "Change them back, or begin a run of its own under another run.name. To go on all the "
        f"same: checkpoint.allow=[{','.join(kinds)}] (see docs/checkpoints.md)"
    )


def _rate(config: RunConfig, path: Path, extras: Extras) -> list[str]:
    """The jump of the learning rate, where there is one that is not a new stage's."""
    began = extras["progress"].get("began", 0)
    if began == extras["progress"]["step"] > 0:
        return []
    try:
        before = saved_config(extras["config"], path)
    except (KeyError, UserError):  # a class that is gone
        return []
    step = extras["progress"]["step"] + 1
    old, new = (
        kind_of(c, "lr_schedule.kind").learning_rate(
            step - began, c.optimizer.lr, c.train.train_iters
        )
        for c in (before, config)
    )
    return [f"learning rate of step {step} {old:.4g} -> {new:.4g}"] if old != new else []
