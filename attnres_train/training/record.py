"""What is logged of a step."""

from __future__ import annotations

from attnres_train.config.schema import RunConfig
from attnres_train.observe.observer import Record
from attnres_train.parallel.ranks import Ranks
from attnres_train.runs.progress import Progress
from attnres_train.training.clock import StepClock, shares
from attnres_train.training.parts import Parts
from attnres_train.training.totals import StepTotals


def step_record(
    config: RunConfig,
    ranks: Ranks,
    parts: Parts,
    progress: Progress,
    totals: StepTotals,
    grad_norm: float,
    lr: float,
    clock: StepClock,
) -> Record:
    """The record of the step that ``progress`` has just counted and ``clock`` has timed."""
    train, peak, seconds = config.train, parts.peak_flops, clock.seconds
    tokens = train.global_batch_size * train.seq_length
    flops = tokens * parts.flops_per_token(totals.document_length)
    flops_per_second = flops / (seconds * ranks.world_size)  # of a device
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
        "tflops": flops_per_second / 1e12,
    }
    record |= shares(totals, clock, ranks.rank, ranks.pipeline.size())
    if parts.planned_bubble is not None:
        record["planned_bubble"] = parts.planned_bubble
    if config.stages:
        record["stage"] = progress.stage
    if progress.skipped:
        record["skipped_steps"] = progress.skipped
    if progress.spikes.count:
        record["loss_spikes"] = progress.spikes.count
    if peak:
        record["mfu"] = flops_per_second / peak
    return record
