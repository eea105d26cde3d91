"""Where a run's curves are shown: TensorBoard, Weights & Biases."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from attnres_train.config.loader import plain_values
from attnres_train.config.schema import LogConfig, WandbConfig
from attnres_train.errors import UserError
from attnres_train.observe.observed import Arrays
from attnres_train.observe.observer import Observer, Record, RunContext, Sample
from attnres_train.observe.pictures import pictures, pixels
from attnres_train.observe.sinks import METRICS, read_records


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


def _earlier(run: RunContext, step: int) -> Iterator[Record]:
    """The records of the steps of ``run`` up to ``step``."""
    return (record for record in read_records(run.folder / METRICS) if record["step"] <= step)


def _has_key(wandb: Any) -> bool:
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except TypeError:  # an older wandb, without these arguments
        return bool(wandb.api.api_key)
    except wandb.Error as error:  # a key that cannot be one
        raise UserError(f"log.wandb.enabled is on, but wandb says: {error}") from error


class _Images:
    """The pictures of an observation, drawn so seldom that they take at most a hundredth of the
    run's time (the last one's cost, on the main rank, is what the next one has to wait for)."""

    def __init__(self) -> None:
        self._not_before = 0.0

    def of(self, run: RunContext, step: int) -> dict[str, Any]:
        """uint8 [height, width, 4] by name; none where it is too early, or nothing to draw."""
        started = time.monotonic()
        if started < self._not_before:
            return {}
        figures = pictures(run.folder, step)
        found = {f"observed/{name}": pixels(figure) for name, figure in figures.items()}
        ended = time.monotonic()
        self._not_before = ended + 100 * (ended - started)
        return found


class TensorBoard(Observer):
    """Scalars as TensorBoard events in ``<run folder>/tensorboard``. Where a run that has no such
    folder yet goes on, the steps up to then are there, too."""

    after_save = True

    def __init__(self, section: Any, key: str, run: RunContext | None = None) -> None:
        super().__init__(section, key, run)
        self.writer_class = _summary_writer()
        self.images = _Images()

    def on_start(self, step: int) -> None:
        folder = self.run.folder / "tensorboard"
        is_new = not folder.is_dir()
        self.writer = self.writer_class(str(folder), purge_step=step + 1)
        for record in _earlier(self.run, step) if is_new else ():
            self.on_step_end(record)

    def on_roll_back(self, step: int) -> None:
        self.writer.close()
        self.on_start(step)

    def on_step_end(self, record: Record) -> None:
        for key, value in record.items():
            if key != "step":
                self.writer.add_scalar(key, value, record["step"])

    def on_samples(self, step: int, samples: Sequence[Sample]) -> None:
        for number, (prompt, text) in enumerate(samples):
            lines = (f"{prompt}{text}").splitlines()
            # Four blanks: as it is, in Markdown.
            shown = "\n".join(f"    {line}" for line in lines)
            self.writer.add_text(f"samples/{number}", shown, step)

    def on_observation(self, step: int, arrays: Arrays) -> None:
        for name, image in self.images.of(self.run, step).items():
            self.writer.add_image(name, image, step, dataformats="HWC")

    def on_end(self) -> None:
        self.writer.close()


class Wandb(Observer):
    """Weights & Biases; ``log.wandb.mode: offline`` needs no network.

    It takes no step twice: after a roll-back, and where a run goes on that has no curve there yet,
    one begins that holds the steps up to then, so that every curve is of one course of the run.
    """

    after_save = True

    def __init__(self, section: Any, key: str, run: RunContext | None = None) -> None:
        super().__init__(section, key, run)
        self.wandb = _wandb(self.run.config.log.wandb)
        self.images = _Images()

    def on_start(self, step: int) -> None:
        # The curve's id is kept in the run folder, so that a resumed run goes on in the same one.
        self.id_file = self.run.folder / "wandb_id"
        if step and self.id_file.is_file():
            self.curve = self._curve()
        else:
            self._begin(step)

    def on_roll_back(self, step: int) -> None:
        before = self.curve
        before.summary["rolled_back_to"] = step
        before.finish()
        self._begin(step, notes=f"after run {before.id}, which was rolled back to step {step}")

    def _begin(self, step: int, **settings: Any) -> None:
        """Begin a curve, with the steps up to ``step``."""
        self.id_file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        self.curve = self._curve(**settings)
        for record in _earlier(self.run, step):
            self.on_step_end(record)

    def _curve(self, **settings: Any) -> Any:
        config = self.run.config
        return self.wandb.init(
            project=config.log.wandb.project,
            name=config.run.name,
            id=self.id_file.read_text(encoding="utf-8"),
            resume="allow",
            mode=config.log.wandb.mode,
            dir=str(self.run.folder),
            config=plain_values(config),
            **settings,
        )

    def on_step_end(self, record: Record) -> None:
        values = {k: v for k, v in record.items() if k != "step"}
        self.curve.log(values, step=int(record["step"]))

    def on_samples(self, step: int, samples: Sequence[Sample]) -> None:
        table = self.wandb.Table(["prompt", "text"], [list(sample) for sample in samples])
        self.curve.log({"samples": table}, step=step)

    def on_observation(self, step: int, arrays: Arrays) -> None:
        images = self.images.of(self.run, step)
        if images:  # the step's record is added to them
            shown = {name: self.wandb.Image(image) for name, image in images.items()}
            self.curve.log(shown, step=step)

    def on_end(self) -> None:
        self.curve.finish()
