"""Whether tensor-parallel ranks can share a model: each takes as many heads, columns, entries of
the vocabulary and tokens as the others. Cheap (no torch), like `config.checks`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import gcd
from typing import NamedTuple

from attnres_train.config.schema import RunConfig

KEY = "parallel.tensor_model_parallel_size"


class _Shared(NamedTuple):
    """Something that ranks share evenly."""

    named: str
    """The key, or keys with their arithmetic."""
    size: int
    ranks: str
    """How many share it, by keys with their arithmetic."""
    number: int
    key: str
    """What to change."""
    unit: int = 1
    """By which it grows where its key grows by one."""


def split_problems(config: RunConfig, *, samples: bool = True) -> Iterator[str]:
    """Everything that the tensor-parallel ranks of ``config`` cannot share: of the model, and of
    ``samples`` to train on."""
    size = config.parallel.tensor_model_parallel_size
    if size == 1:
        return
    for shared in (*_of_model(config), *(_of_samples(config) if samples else ())):
        left = shared.size % shared.number
        if left:
            below, above = _near(shared)
            yield (
                f"{shared.named} / {shared.ranks} leaves {left} over, and every rank takes as "
                f"many: take {f'{below} or ' if below else ''}{above} for {shared.key}, or another "
                f"{KEY}"
            )


def _of_model(config: RunConfig) -> Iterator[_Shared]:
    model, moe = config.model, config.model.moe
    layers, size = range(model.num_layers), config.parallel.tensor_model_parallel_size
    alone = partial(_alone, size)
    full = [model.is_full_attention(layer) for layer in layers]
    dense = [model.is_dense(layer) for layer in layers]
    if not all(full):
        yield alone("model.kda.num_heads", model.kda.num_heads)
    if any(full):
        yield alone("model.mla.num_heads", model.mla.num_heads)
    if any(dense):
        yield alone("model.intermediate_size", model.intermediate_size)
    if not all(dense) and moe.num_shared_experts:
        key, experts = "model.moe.intermediate_size", moe.num_shared_experts
        width = experts * moe.intermediate_size
        named = f"model.moe.num_shared_experts {experts} x {key} {moe.intermediate_size} = {width}"
        yield _Shared(named, width, f"{KEY} {size}", size, key, experts)
    yield alone("model.vocab_size", model.vocab_size)


def _of_samples(config: RunConfig) -> Iterator[_Shared]:
    key, length, parallel = "train.seq_length", config.train.seq_length, config.parallel
    context, size = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if context == 1:
        yield _alone(size, key, length)
    else:
        ranks = f"(parallel.context_parallel_size {context} x {KEY} {size} = {context * size})"
        yield _Shared(f"{key} {length}", length, ranks, context * size, key)


def _alone(size: int, key: str, value: int) -> _Shared:
    return _Shared(f"{key} {value}", value, f"{KEY} {size}", size, key)


def _near(shared: _Shared) -> tuple[int, int]:
    """The nearest values of its key that fit, from below (0: there is none) and above."""
    value = shared.size // shared.unit
    step = shared.number // gcd(shared.number, shared.unit)
    return value // step * step, (value // step + 1) * step
