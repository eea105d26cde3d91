"""The training loop. It owns the order of things (resume, step, validate, save, observe) and no
mechanism: `building.build_parts` hands in chunks, engine, optimizer, data and checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from attnres_train.config.kinds import kind_of
from attnres_train.config.schema import RunConfig
from attnres_train.errors import UserError
from attnres_train.model.batch import MicroBatch
from attnres_train.model.flops import mean_document_length
from attnres_train.model.moe.layer import router_loads, update_router_biases
from attnres_train.observe.observed import Arrays
from attnres_train.observe.observer import Observer, Record
from attnres_train.optim.clipping import clip_factor, grad_square_sum, scale_grads
from attnres_train.optim.schedules import LRSchedule
from attnres_train.parallel.expert_record import ExpertRecord
from attnres_train.parallel.gradients import sum_over
from attnres_train.parallel.ranks import Ranks
from attnres_train.pipeline.run.engine import StepResult
from attnres_train.runs.progress import Progress
from attnres_train.supervise.recorder import Recorder
from attnres_train.training.batches import StepBatches
from attnres_train.training.clock import StepClock
from attnres_train.training.nonfinite import Skips
from attnres_train.training.observation import Observation
from attnres_train.training.parts import Parts
from attnres_train.training.qk_clip import QKClip
from attnres_train.training.record import step_record
from attnres_train.training.roll_back import roll_back
from attnres_train.training.spikes import look
from attnres_train.training.totals import StepTotals, over_ranks
from attnres_train.training.validation import validate

logger = logging.getLogger(__name__)


class SaveFailed(UserError):
    """The state that a run ends with could not be saved: the disk is full, or gone."""


class Trainer:
    """Trains the run, or the stage of it that ``config`` is, for ``train.train_iters`` (or up to
    ``train.stop_after``), from where it stands."""

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        parts: Parts,
        stop_requested: Callable[[], bool] = lambda: False,
        recorder: Recorder | None = None,
    ) -> None:
        self.config, self.ranks, self.parts = config, ranks, parts
        self.stop_requested = stop_requested
        self.recorded = recorder.recorded if recorder else nullcontext
        self.lr_schedule: LRSchedule = kind_of(config, "lr_schedule.kind")
        self.progress = Progress()
        self.stopped = False
        """Whether something asked for an end, on whichever rank."""
        self.chunks: list[torch.nn.Module] = list(parts.chunks.values())
        ports = next(iter(parts.chunks.values())).ports  # all chunks have the same
        self.batches = StepBatches(ranks, ports.sequence.shares)
        self.expert_record = ExpertRecord(ports.exchange, ranks)
        self.qk_clip = QKClip(config.optimizer.qk_clip, parts.chunks, ranks)
        why, limit = self.expert_record.why_not_finite, config.train.max_skipped_steps
        self.observation = Observation(config, ranks, parts.chunks, parts.optimizer)
        self.observed: Arrays | None = None
        """What the step just done has shown, on the main rank."""
        self.skips = Skips(limit, parts.chunks, ranks.control, why)

    def fit(self) -> Progress:
        """Run the loop. Returns the progress reached, which is also what was saved last."""
        train, observers = self.config.train, self.parts.observers
        self.progress = self.parts.checkpoints.resume()
        end = self.progress.began + train.train_iters
        end = min(end, train.stop_after or end)
        self.observation.last_step = end
        # A failure is written down before observers are told, which may take their time.
        watching = observers.watching(self.progress.step)
        with self.parts.checkpoints.settled(), watching, self.recorded():
            while self.progress.step < end and not self.stopped:
                observers.tell(Observer.on_step_begin, self.progress.step + 1)
                record, totals = self.train_step()
                self.stopped, step = totals.stopping, self.progress.step
                if self._rolled_back(record):
                    continue
                if self.observed is not None:
                    observers.tell(Observer.on_observation, step, self.observed)
                if train.eval_interval and (step % train.eval_interval == 0 or step == end):
                    record |= validate(train, self.ranks, self.parts, self.batches)
                    observers.tell(Observer.on_validation, step, record["validation_loss"])
                self._write_samples()
                if self.config.log.observers:  # they may look at parameters
                    self.parts.optimizer.wait()
                observers.tell_step_end(record, after_save=False)
                section = self.config.checkpoint
                if section.drift_interval and step % section.drift_interval == 0:
                    self.parts.optimizer.wait()
                    self.parts.checkpoints.compare_replicas(step)
                if not totals.saving:
                    self._tell_save()
                last = step == end or self.stopped
                if last or (section.save_interval and step % section.save_interval == 0):
                    self._save(last)
                observers.tell_step_end(record, after_save=True)
        return self.progress

    def _rolled_back(self, record: Record) -> bool:
        """Whether the run stands at an earlier step now, since a spike began with this one."""
        progress, observers = self.progress, self.parts.observers
        if self.config.train.on_spike == "tell" or progress.spikes.since != progress.step:
            return False
        self.parts.optimizer.wait()  # nothing of before arrives on top of what is loaded
        self._tell_save()  # a save under way is of a step before
        back = roll_back(self.config, self.parts.checkpoints, progress)
        if back is None:
            return False
        observers.tell_step_end(record, after_save=False)
        observers.tell_step_end(record, after_save=True)
        self.progress = back
        observers.tell(Observer.on_roll_back, back.step)
        return True

    def _write_samples(self) -> None:
        samples, step = self.parts.samples, self.progress.step
        if samples is None or not samples.due(step):
            return
        self.parts.optimizer.wait()
        found = samples.write()
        self.parts.pulse.rest()
        self.parts.observers.tell(Observer.on_samples, step, found)

    def _save(self, last: bool) -> None:
        """Save the state as it is now. The ``last`` time, and without `checkpoint.async_save`, it
        is on the disk afterwards. Raises SaveFailed where the last one is not."""
        self._tell_save()  # waits for the one before: its buffers are used again
        self.parts.optimizer.wait()
        self.parts.checkpoints.start_save(self.progress)
        if last or not self.config.checkpoint.async_save:
            self._tell_save(last)

    def _tell_save(self, last: bool = False) -> None:
        """Wait for the save under way, if there is one, and tell observers of it."""
        outcome = self.parts.checkpoints.ended_save()
        if outcome is None:
            return
        if outcome.path is not None:
            self.parts.observers.tell(Observer.on_save, outcome.step, outcome.path)
        elif last:
            raise SaveFailed(
                f"{outcome.told()}\nMend that and give the same command again: it resumes at the "
                "newest checkpoint that is there"
            )
        elif self.ranks.is_main:
            logger.warning("%s; the run goes on and saves at the next interval", outcome.told())

    def train_step(self) -> tuple[Record, StepTotals]:
        """One optimizer step: forward and backward of every micro-batch, reduction, update.

        Returns the step's record, and what it came to over all ranks.
        Where the loss or the gradient norm is not finite the update is left out, on all ranks, and
        the data are passed over. Raises FloatingPointError where that is one too many (`Skips`).
        """
        clock = StepClock()
        parts, progress = self.parts, self.progress
        step = progress.step + 1
        data, place = parts.data, (self.ranks.dp_rank, self.ranks.dp_size)
        with clock.on("data"):
            batches = data.micro_batches(progress.samples, *place)
            parts.pulse.beat()  # from here on it waits for others
            loss_tokens = self.batches.mean_loss_tokens(batches)
            micro_batches = self.batches.to_device(batches, loss_tokens)
        micro_batches[0].probe = probe = self.observation.probe(step)
        self.expert_record.begin()
        self.qk_clip.begin()
        reduction = parts.optimizer.reduction
        with clock.on("passes"):
            result = parts.engine.train_step(micro_batches, reduction.last_backward)
        clock.waited = result.waited_seconds
        with clock.on("reduce"):
            reduction.finish()
        gather = self.observation.gather
        self.observed = gather(probe, result, len(micro_batches)) if probe else None
        parts.observers.tell(Observer.on_backward, step, parts.chunks)
        with clock.on("reduce"):
            grad_norm = self._clip()
        totals = self._over_ranks(result, micro_batches, clock.spent())
        taken = not self.skips.passes_over(step, totals.loss, grad_norm, self.ranks.is_main)
        lr = self.lr_schedule.learning_rate(
            step - progress.began, self.config.optimizer.lr, self.config.train.train_iters
        )
        with clock.on("optimizer"):
            of_layers = self.qk_clip.of_step()
            if taken:
                parts.optimizer.step(lr, self.qk_clip.factors())
            parts.optimizer.zero_grad()
        of_layers |= self._update_router_biases(taken)

        samples = self.config.train.global_batch_size
        progress.step = step
        progress.samples += samples
        progress.tokens += samples * self.config.train.seq_length
        progress.skipped += not taken
        look(self.config.train, progress, totals.loss, self.ranks.is_main)
        parts.pulse.rest()
        record = step_record(self.config, self.ranks, parts, progress, totals, grad_norm, lr, clock)
        return record | of_layers, totals

    def _clip(self) -> float:
        """Scale the gradients to ``train.clip_grad``; returns the norm over the whole model."""
        optimizer = self.parts.optimizer
        squares = grad_square_sum(optimizer.counted, self.ranks.device)
        norm = sum_over(squares).sqrt().item()
        factor = clip_factor(norm, self.config.train.clip_grad)
        if factor < 1:
            scale_grads(optimizer.owned, factor)
        return norm

    def _update_router_biases(self, taken: bool) -> dict[str, float]:
        """By the loads of the step, which are forgotten if it is not ``taken``. Returns what is
        logged of the experts."""
        loads = [load for chunk in self.chunks for load in router_loads(chunk)]
        for load in loads:
            sum_over(load, self.ranks.stage)
        record = self.expert_record.of_step(loads)
        rate = self.config.model.moe.bias_update_rate if taken else 0.0
        update_router_biases(self.chunks, rate)
        return record

    def _over_ranks(
        self, result: StepResult, micro_batches: list[MicroBatch], spent: Sequence[float]
    ) -> StepTotals:
        saving, stopping = self.parts.checkpoints.saving, self.stop_requested()
        lengths = [mean_document_length(batch, self.batches.shares) for batch in micro_batches]
        return over_ranks(
            self.ranks,
            result,
            document_length=sum(lengths) / len(lengths),
            stopping=stopping,
            saving=saving,
            spent=spent,
        )
