"""Build the optimizer of a rank from its parameters and the `optimizer` section."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from attnres_train.config.schema import OptimizerConfig
from attnres_train.optim.groups import ParamRule, assign
from attnres_train.optim.hybrid import HybridOptimizer, make_masters
from attnres_train.optim.muon import Muon

_NS_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}

# Newton-Schulz wants few large launches on a GPU; on a CPU, batches beyond its cache cost a third.
_GPU_BATCH, _CPU_BATCH = 2**26, 2**18


def build_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]],
    config: OptimizerConfig,
    device: torch.device | str,
) -> HybridOptimizer:
    """The optimizer over a rank's parameters (chunk names, all chunks together), split between Muon
    and AdamW by `optim.groups`. Build it once the weights have their initial values: fp32
    masters of half-precision parameters are copies of them."""
    params = dict(named_parameters)
    masters = make_masters(params)
    groups: dict[ParamRule, list[Tensor]] = {}
    for name, master in masters.items():
        groups.setdefault(assign(name, master, config.kind), []).append(master)
    kinds = {"muon": _muon, "adamw": _adamw}
    parts = [
        kinds[rule.kind](group, config.weight_decay * rule.weight_decay, config, device)
        for rule, group in groups.items()
    ]
    return HybridOptimizer(params, masters, parts)


def _is_cuda(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


def _muon(
    params: list[Tensor], weight_decay: float, config: OptimizerConfig, device: torch.device | str
) -> Muon:
    auto = "bf16" if _is_cuda(device) else "fp32"
    return Muon(
        params,
        config.lr,
        momentum=config.momentum,
        weight_decay=weight_decay,
        ns_steps=config.ns_steps,
        ns_dtype=_NS_DTYPES[auto if config.ns_dtype == "auto" else config.ns_dtype],
        max_batch_elements=_GPU_BATCH if _is_cuda(device) else _CPU_BATCH,
    )


def _adamw(
    params: list[Tensor], weight_decay: float, config: OptimizerConfig, device: torch.device | str
) -> torch.optim.AdamW:
    fused = _is_cuda(device)
    adamw = torch.optim.AdamW(
        params,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=weight_decay,
        fused=fused or None,
    )
    # torch creates this state in the first step, but a checkpoint must be loaded before that.
    for param in params:
        adamw.state[param] = {
            "step": torch.zeros((), dtype=torch.float32, device=param.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": torch.zeros_like(param),
        }
    return adamw
