"""Where a run's metrics go: sinks, observers that write down one flat record per step."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from attnres_train.config.schema import LogConfig, WandbConfig
from attnres_train.errors import UserError
from attnres_train.observe.observer import Observer, Record, RunContext


class JsonLines(Observer):
    """One JSON object per step in ``metrics.jsonl``. Resuming drops the records of steps that the
    checkpoint does not hold, so that every step stands there once."""

    def on_start(self, step: int) -> None:
        path = self.run.folder / "metrics.jsonl"
        kept = [r for r in read_records(path) if r["step"] <= step] if step else []
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        partial.replace(path)
        self.file = path.open("a", encoding="utf-8")

    def on_step_end(self, record: Record) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def on_end(self) -> None:
        self.file.close()


def read_records(path: Path) -> list[Record]:
    """The records of a ``metrics.jsonl``; a last line cut off by a crash is left out."""
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def check_sinks(log: LogConfig) -> None:
    """Raises UserError where a sink that ``log`` wants cannot work: its package is not installed,
    or there is no key for Weights & Biases. Uses no network."""
    if log.tensorboard:
        _summary_writer()
    if log.wandb.enabled:
        _wandb(log.wandb)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "log.tensorboard is on, but tensorboard is not installed: "
            "pip install 'attnres-train[log]', or set log.tensorboard=false"
        ) from error
    return SummaryWriter


def _wandb(section: WandbConfig) -> Any:
    """The module. Raises UserError where it is not installed, or where it would ask for a key."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "log.wandb.enabled is on, but wandb is not installed: "
            "pip install 'attnres-train[log]', or set log.wandb.enabled=false"
        ) from error
    if section.mode == "online" and not _has_key(wandb):
        raise UserError(
            "log.wandb.enabled is on and log.wandb.mode online, but there is no key for Weights & "
            "Biases: run `wandb login`, set WANDB_API_KEY, or set log.wandb.mode=offline"
        )
    return wandb


def _has_key(wandb: Any) -> bool:
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except TypeError:  # an older wandb, without these arguments
        return bool(wandb.api.api_key)
    except wandb.Error as error:  # a key that cannot be one
        raise UserError(f"log.wandb.enabled is on, but wandb says: {error}") from error


class TensorBoard(Observer):
    """Scalars as TensorBoard events in ``<run folder>/tensorboard``."""

    def __init__(self, section: Any, key: str, run: RunContext | None = None) -> None:
        super().__init__(section, key, run)
        self.writer_class = _summary_writer()

    def on_start(self, step: int) -> None:
        folder = self.run.folder / "tensorboard"
        self.writer = self.writer_class(str(folder), purge_step=step + 1)

    def on_step_end(self, record: Record) -> None:
        for key, value in record.items():
            if key != "step":
                self.writer.add_scalar(key, value, record["step"])

    def on_end(self) -> None:
        self.writer.close()


class Wandb(Observer):
    """Weights & Biases; ``log.wandb.mode: offline`` needs no network."""

    def __init__(self, section: Any, key: str, run: RunContext | None = None) -> None:
        super().__init__(section, key, run)
        self.wandb = _wandb(self.run.config.log.wandb)

    def on_start(self, step: int) -> None:
        config, folder = self.run.config, self.run.folder
        # The run's id is kept in its folder, so that a resumed run goes on in the same curve.
        id_file = folder / "wandb_id"
        if not (step and id_file.is_file()):
            id_file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        self.curve = self.wandb.init(
            project=config.log.wandb.project,
            name=config.run.name,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            mode=config.log.wandb.mode,
            dir=str(folder),
            config=config.model_dump(),
        )

    def on_step_end(self, record: Record) -> None:
        values = {k: v for k, v in record.items() if k != "step"}
        self.curve.log(values, step=int(record["step"]))

    def on_end(self) -> None:
        self.curve.finish()
