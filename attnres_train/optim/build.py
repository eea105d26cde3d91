"""Build the optimizer of a rank from its parameters, their rules and the `optimizer` section."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from attnres_train.config.schema import OptimizerConfig
from attnres_train.errors import UserError
from attnres_train.model.parameters import ParameterRule
from attnres_train.model.parts import tensor_of
from attnres_train.optim.hybrid import HybridOptimizer, make_masters
from attnres_train.optim.kinds import OptimizerKind, Part, optimizer_kind
from attnres_train.optim.ports import AllHere, MatrixExchange


def build_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]],
    rules: Mapping[str, ParameterRule],
    config: OptimizerConfig,
    device: torch.device | str,
    exchange: MatrixExchange | None = None,
) -> HybridOptimizer:
    """The optimizer over the parameters that a rank updates (chunk names, all chunks together; of
    some perhaps a part, as `model.parts` names it), in the groups that `optimizer.kind` makes by
    their ``rules`` (`model.parameters.parameter_rules`, of whole parameters). Build it once the
    weights have their initial values: fp32 masters of half-precision parameters are copies of them.
    ``exchange`` makes matrices whole that tensor ranks share.

    Raises ValueError for a parameter without a rule, or with one that does not fit its shape, and
    for an optimizer whose state would not be saved; UserError where a kind cannot update a part.
    """
    params, kind = dict(named_parameters), optimizer_kind(config)
    kind.exchange = exchange or AllHere()
    masters = make_masters(params)
    parts: dict[Part, list[Tensor]] = {}
    for name, master in masters.items():
        whole = tensor_of(name)
        if whole not in rules:
            raise ValueError(f"parameter {whole!r} has no rule for the optimizer")
        part = kind.part(whole, tuple(master.shape), rules[whole])
        if kind.exchange.size == 1:
            part = replace(part, split=None)
        elif rules[whole].split is not None:
            _check_takes_parts(kind, part, whole)
        parts.setdefault(part, []).append(master)
    optimizers = []
    for part, group in parts.items():
        optimizer = kind.build(part, group, device)
        _create_state(optimizer, group, kind.states(part))
        optimizers.append(optimizer)
    return HybridOptimizer(params, masters, optimizers, kind.exchange)


def made_whole(
    named_parameters: Iterable[tuple[str, Tensor]],
    rules: Mapping[str, ParameterRule],
    config: OptimizerConfig,
) -> Iterator[tuple[str, Tensor]]:
    """Those, of what `build_optimizer` is given, that an exchange makes whole where they are parts
    of matrices."""
    kind = optimizer_kind(config)
    for name, param in named_parameters:
        whole = tensor_of(name)
        if kind.part(whole, tuple(param.shape), rules[whole]).split is not None:
            yield name, param


def _check_takes_parts(kind: OptimizerKind, part: Part, name: str) -> None:
    if not (kind.takes_parts or kind.is_elementwise(part)):
        raise UserError(
            f"optimizer.kind {kind.section.kind} does not say that it can update a part of {name}, "
            "of which parallel.tensor_model_parallel_size gives each rank one: let its "
            "`is_elementwise` say so where each element is updated by itself, or take 1"
        )


def _create_state(
    optimizer: torch.optim.Optimizer, params: list[Tensor], keys: tuple[str, ...]
) -> None:
    """Create what ``optimizer`` lacks of the state tensors ``keys``. torch's optimizers create
    theirs in the first step, but a checkpoint must be loaded before that."""
    group = optimizer.param_groups[0]
    counts_on_device = group.get("fused") or group.get("capturable")
    for param in params:
        state = optimizer.state[param]
        if keys and not state:
            device = param.device if counts_on_device else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        for key in keys:
            if key not in state:
                state[key] = torch.zeros_like(param)
