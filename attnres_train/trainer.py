"""The training loop. It owns the order of things (resume, step, validate, save, observe) and no
mechanism: chunks, engine, optimizer, data and checkpoints are handed in by `train.build`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from attnres_train.config.kinds import kind_of
from attnres_train.config.schema import RunConfig
from attnres_train.model.batch import MicroBatch
from attnres_train.model.flops import mean_document_length
from attnres_train.model.moe.layer import router_loads, update_router_biases
from attnres_train.observe.hardware import peak_memory_bytes
from attnres_train.observe.sinks import Observer, Record
from attnres_train.optim.clipping import clip_factor, grad_square_sum, scale_grads
from attnres_train.optim.schedules import LRSchedule
from attnres_train.parallel.gradients import average_gradients, sum_over
from attnres_train.parallel.ranks import Ranks


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds beside tensors."""

    step: int = 0
    samples: int = 0
    tokens: int = 0


@dataclass
class Parts:
    """What the loop drives, already built for this rank."""

    chunks: list[torch.nn.Module]
    engine: Any
    optimizer: Any
    data: Any
    checkpoints: Any
    observers: list[Observer]
    flops_per_token: Callable[[float], float]
    """Of the `mean_document_length` of what is trained on."""
    peak_flops: float | None


class StepTotals(NamedTuple):
    """What a step came to over all ranks. ``memory_bytes`` is the sum of the processes' on CPU and
    the largest device's on CUDA."""

    loss: float
    p2p_bytes: int
    memory_bytes: int
    document_length: float
    stopping: bool


class Trainer:
    """Trains up to ``train.train_iters`` (or ``train.stop_after``), from where the run stands."""

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        parts: Parts,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.ranks, self.parts = config, ranks, parts
        self.stop_requested = stop_requested
        self.lr_schedule: LRSchedule = kind_of(config, "lr_schedule.kind")
        self.progress = Progress()
        self.parameters = [p for chunk in parts.chunks for p in chunk.parameters()]

    def fit(self) -> Progress:
        """Run the loop. Returns the progress reached, which is also what was saved last."""
        train = self.config.train
        end = min(train.train_iters, train.stop_after or train.train_iters)
        self.progress = self.parts.checkpoints.resume()
        saved = self.progress.step
        for observer in self.parts.observers:
            observer.on_start(self.progress.step)
        try:
            stopping = False
            while self.progress.step < end and not stopping:
                record, stopping = self.train_step()
                step = self.progress.step
                if train.eval_interval and (step % train.eval_interval == 0 or step == end):
                    record["validation_loss"] = self.validate()
                for observer in self.parts.observers:
                    observer.on_step(record)
                interval = self.config.checkpoint.save_interval
                if step == end or stopping or (interval and step % interval == 0):
                    self.parts.checkpoints.save(self.progress)
                    saved = step
        finally:
            for observer in self.parts.observers:
                observer.on_end()
        assert saved == self.progress.step
        return self.progress

    def train_step(self) -> tuple[Record, bool]:
        """One optimizer step: forward and backward of every micro-batch, reduction, update.

        Returns the step's record, and whether any rank was asked to stop.
        Raises FloatingPointError when the loss or the gradient norm is not finite; the parameters
        are those of the step before.
        """
        started = time.perf_counter()
        parts, progress = self.parts, self.progress
        micro_batches = self._micro_batches(progress.samples)
        result = parts.engine.train_step(micro_batches)
        average_gradients(self.parameters, self.ranks.data)
        grad_norm = self._clip()
        if not math.isfinite(grad_norm):
            raise FloatingPointError(
                f"the gradient norm of step {progress.step + 1} is {grad_norm}: parameters are "
                "unchanged since the last step; resume from the last checkpoint with a lower "
                "optimizer.lr, a longer lr_schedule.warmup_iters or train.precision=fp32"
            )
        lr = self.lr_schedule.learning_rate(
            progress.step + 1, self.config.optimizer.lr, self.config.train.train_iters
        )
        parts.optimizer.step(lr)
        parts.optimizer.zero_grad()
        self._update_router_biases()

        samples = self.config.train.global_batch_size
        tokens = samples * self.config.train.seq_length
        progress.step += 1
        progress.samples += samples
        progress.tokens += tokens
        totals = self._over_ranks(result, micro_batches)
        seconds = time.perf_counter() - started
        record = {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": totals.loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "p2p_bytes": totals.p2p_bytes,
            "memory_bytes": totals.memory_bytes,
        }
        if parts.peak_flops:
            flops = tokens * parts.flops_per_token(totals.document_length)
            record["mfu"] = flops / (seconds * parts.peak_flops * self.ranks.world_size)
        return record, totals.stopping

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the fixed validation batches, nats per token."""
        for chunk in self.parts.chunks:
            chunk.eval()
        total = num_tokens = 0.0
        for index in range(self.config.train.eval_iters):
            batches = self.parts.data.validation_batches(
                index, self.ranks.dp_rank, self.ranks.dp_size
            )
            micro_batches = self._to_device(batches)
            result = self.parts.engine.evaluate(micro_batches)
            loss = self._over_ranks(result, micro_batches).loss
            share = micro_batches[0].loss_tokens.item()
            total, num_tokens = total + share * loss, num_tokens + share
        for chunk in self.parts.chunks:
            chunk.train()
        return total / num_tokens

    def _micro_batches(self, consumed: int) -> list[MicroBatch]:
        return self._to_device(
            self.parts.data.micro_batches(consumed, self.ranks.dp_rank, self.ranks.dp_size)
        )

    def _to_device(self, batches: Sequence[dict]) -> list[MicroBatch]:
        """The batches of a step, on the device. All divide by the step's mean number of tokens with
        a loss, so that the mean over micro-batches and replicas is that over all these tokens."""
        device, data = self.ranks.device, self.ranks.data
        num_tokens = sum(batch["loss_mask"].sum(dtype=torch.float64) for batch in batches)
        mean = sum_over(num_tokens.to(device), data) / (len(batches) * data.size())
        return [MicroBatch(**batch, loss_tokens=mean).to(device) for batch in batches]

    def _clip(self) -> float:
        """Scale the gradients to ``train.clip_grad``; returns the norm over the whole model."""
        squares = grad_square_sum(self.parameters, self.ranks.device)
        norm = sum_over(squares, self.ranks.pipeline).sqrt().item()
        factor = clip_factor(norm, self.config.train.clip_grad)
        if factor < 1:
            scale_grads(self.parameters, factor)
        return norm

    def _update_router_biases(self) -> None:
        for load in (load for chunk in self.parts.chunks for load in router_loads(chunk)):
            sum_over(load, self.ranks.data)
        update_router_biases(self.parts.chunks, self.config.model.moe.bias_update_rate)

    def _over_ranks(self, result: Any, micro_batches: list[MicroBatch]) -> StepTotals:
        """The totals of a step of ``micro_batches``, by one gather."""
        device = self.ranks.device
        has_loss = result.loss is not None
        mine = torch.tensor(
            [
                float(result.loss) if has_loss else 0.0,
                float(has_loss),
                result.p2p_bytes,
                peak_memory_bytes(device),
                statistics.fmean(map(mean_document_length, micro_batches)),
                self.stop_requested(),
            ],
            dtype=torch.float64,
            device=device,
        )
        rows = mine.new_empty(self.ranks.world_size, len(mine))
        dist.all_gather(list(rows), mine)
        loss, with_loss, p2p_bytes, memory, document_lengths, stop = rows.T.tolist()
        peak = max(memory) if device.type == "cuda" else sum(memory)
        return StepTotals(
            loss=sum(loss) / sum(with_loss),
            p2p_bytes=int(sum(p2p_bytes)),
            memory_bytes=int(peak),
            document_length=statistics.fmean(document_lengths),
            stopping=any(stop),
        )
