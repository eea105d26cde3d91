"""What follows from a configuration, each figure with the arithmetic that leads to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from attnres_train.config.checks import data_parallel_size
from attnres_train.config.kinds import kind_of
from attnres_train.config.schema import RunConfig


def describe(
    config: RunConfig,
    chunk_layers: Sequence[int],
    world_size: int | None = None,
    more: Mapping[str, str] | None = None,
) -> str:
    """The derived values of a checked configuration, one ``name  value`` line each: `derived`, and
    after them ``more`` (`planning.facts`)."""
    return as_lines(derived(config, chunk_layers, world_size) | dict(more or {}))


def as_lines(values: Mapping[str, str]) -> str:
    """One ``name  value`` line each."""
    width = max(map(len, values))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in values.items())


def derived(
    config: RunConfig, chunk_layers: Sequence[int], world_size: int | None = None
) -> dict[str, str]:
    """What follows from a checked configuration by arithmetic alone.

    ``chunk_layers`` are the decoder layers of each chunk (`planning.chunk_layers`); ``world_size``
    as in `check_config`: None takes the processes of one replica.
    """
    parallel = config.parallel
    replicas = data_parallel_size(config, world_size)
    processes = replicas * parallel.model_parallel_size
    return {
        "model": _model(config),
        "residual": _residual(config),
        "pipeline": f"{_count(parallel.pipeline_model_parallel_size, 'rank')} x "
        f"{_count(parallel.virtual_pipeline_model_parallel_size, 'virtual stage')} = "
        f"{_chunks(chunk_layers)}",
        "processes": f"{processes} / {parallel.model_parallel_size} per replica = "
        f"{_count(replicas, 'data-parallel replica')}",
        **_shares(config),
        **_experts(config),
        "micro-batches": _micro_batches(config, replicas),
        "tokens": _tokens(config),
        "optimizer": kind_of(config, "optimizer.kind").summary(),
        "learning rate": kind_of(config, "lr_schedule.kind").summary(config),
    }


def _shares(config: RunConfig) -> dict[str, str]:
    size, length = config.parallel.context_parallel_size, config.train.seq_length
    if size == 1:
        return {}
    return {"samples": f"{length} tokens / {2 * size} shares x 2 = {length // size} per rank"}


def _experts(config: RunConfig) -> dict[str, str]:
    experts, size = config.model.moe.num_experts, config.parallel.expert_model_parallel_size
    if size == 1:
        return {}
    return {"experts": f"{experts} / {size} ranks = {experts // size} per rank and layer"}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _model(config: RunConfig) -> str:
    model = config.model
    full = sum(map(model.is_full_attention, range(model.num_layers)))
    dense = sum(map(model.is_dense, range(model.num_layers)))
    return (
        f"{model.num_layers} layers x 2 = {model.num_sublayers} sublayers: attention "
        f"{model.num_layers - full} KDA + {full} MLA, MLP {dense} dense + "
        f"{model.num_layers - dense} MoE"
    )


def _residual(config: RunConfig) -> str:
    """What the kind says of itself; of a block size that it does not read, that it does not. Files
    that differ in the kind alone may share one, so it is no error."""
    section = config.model.residual
    kind, size = kind_of(config, "model.residual.kind"), section.block_size
    asked = size != type(section).model_fields["block_size"].default
    unread = f"; block_size {size} is not read" if asked and kind.block_size != size else ""
    rank = section.norm_gate_rank
    gate = "" if rank is None else f"; norm_gate_rank {rank}"
    return kind.summary() + gate + unread


def _chunks(layers: Sequence[int]) -> str:
    """``12 chunks of 2 (x 11), 5 layers``, in model order."""
    runs = [(size, len(list(run))) for size, run in groupby(layers)]
    sizes = ", ".join(f"{size} (x {times})" if times > 1 else f"{size}" for size, times in runs)
    return f"{_count(len(layers), 'chunk')} of {sizes} layer{'' if runs[-1][0] == 1 else 's'}"


def _micro_batches(config: RunConfig, replicas: int) -> str:
    train = config.train
    count = train.global_batch_size // (train.micro_batch_size * replicas)
    return (
        f"{train.global_batch_size} samples / ({train.micro_batch_size} per micro-batch x "
        f"{_count(replicas, 'replica')}) = {count} per step (gradient accumulation)"
    )


def _tokens(config: RunConfig) -> str:
    train = config.train
    per_step = train.global_batch_size * train.seq_length
    return (
        f"{train.global_batch_size} samples x {train.seq_length} = {per_step:,} per step, x "
        f"{train.train_iters:,} steps = {per_step * train.train_iters:,}"
    )
