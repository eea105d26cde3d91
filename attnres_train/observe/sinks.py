"""Where a run's metrics go. A sink is an observer: it sees one flat record per step."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any, Protocol

from attnres_train.config.schema import RunConfig
from attnres_train.errors import UserError

Record = dict[str, Any]


class Observer(Protocol):
    """Told of a run's progress; exists on the main process only.

    ``record`` holds at least ``step, tokens, loss, grad_norm, lr, tokens_per_second, step_seconds,
    p2p_bytes``, and ``validation_loss`` for a step behind which validation ran.
    """

    def on_start(self, step: int) -> None:
        """The run begins or resumes behind ``step`` (0: from scratch)."""

    def on_step(self, record: Record) -> None:
        """A step is done."""

    def on_end(self) -> None:
        """The run ended, also by an error."""


class JsonLines:
    """One JSON object per step in ``metrics.jsonl``. Resuming drops the records of steps that the
    checkpoint does not hold, so that every step stands there once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_start(self, step: int) -> None:
        kept = [r for r in read_records(self.path) if r["step"] <= step] if step else []
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        partial.replace(self.path)
        self.file = self.path.open("a", encoding="utf-8")

    def on_step(self, record: Record) -> None:
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


class TensorBoard:
    """Scalars as TensorBoard events in ``<run folder>/tensorboard``."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "log.tensorboard is on, but tensorboard is not installed: "
                "pip install 'attnres-train[log]', or set log.tensorboard=false"
            ) from error
        self.folder = folder
        self.writer_class = SummaryWriter

    def on_start(self, step: int) -> None:
        self.writer = self.writer_class(str(self.folder), purge_step=step + 1)

    def on_step(self, record: Record) -> None:
        for key, value in record.items():
            if key != "step":
                self.writer.add_scalar(key, value, record["step"])

    def on_end(self) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases; ``log.wandb.mode: offline`` needs no network."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "log.wandb.enabled is on, but wandb is not installed: "
                "pip install 'attnres-train[log]', or set log.wandb.enabled=false"
            ) from error
        self.wandb, self.config, self.folder = wandb, config, folder

    def on_start(self, step: int) -> None:
        # The run's id is kept in its folder, so that a resumed run goes on in the same curve.
        id_file = self.folder / "wandb_id"
        if not (step and id_file.is_file()):
            id_file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        self.run = self.wandb.init(
            project=self.config.log.wandb.project,
            name=self.config.run.name,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            mode=self.config.log.wandb.mode,
            dir=str(self.folder),
            config=self.config.model_dump(),
        )

    def on_step(self, record: Record) -> None:
        self.run.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def on_end(self) -> None:
        self.run.finish()
