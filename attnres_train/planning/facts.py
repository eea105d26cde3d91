"""What follows from a configuration by its model and on a machine: parameters, FLOPs, device,
precision. The lines that `config.summary` cannot have, for they need torch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from attnres_train.config.model_schema import ModelConfig
from attnres_train.config.schema import RunConfig
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.flops import forward_flops_per_token
from attnres_train.model.moe.layer import Experts
from attnres_train.planning.balance import imbalance

_PRECISIONS = {
    "fp32": "parameters, matmuls, residual stream and gradients in fp32",
    "bf16": "matmuls and residual stream in bf16 (autocast), parameters and gradients in fp32",
    "bf16_params": "parameters, matmuls and residual stream in bf16, masters and gradients in fp32",
}


class Parameters(NamedTuple):
    """Numbers of parameters."""

    total: int
    active: int
    """Without the routed experts that a token does not choose."""


def count_parameters(model: ModelConfig) -> Parameters:
    """Those of the whole model, which is made on the meta device: nothing is allocated."""
    chunk = ModelChunk(model, 0, model.num_layers, device="meta")
    total = sum(p.numel() for p in chunk.parameters())
    experts = [module for module in chunk.modules() if isinstance(module, Experts)]
    routed = sum(p.numel() for module in experts for p in module.parameters())
    chosen = routed * model.moe.num_experts_per_token // model.moe.num_experts
    return Parameters(total, total - routed + chosen)


def facts(config: RunConfig, device: torch.device, world_size: int | None = None) -> dict[str, str]:
    """Lines for `config.summary.describe`; ``device`` is the one that the run has here,
    ``world_size`` as in `check_config`."""
    model, moe = config.model, config.model.moe
    told = imbalance(config, world_size)
    count = count_parameters(model)
    chosen = f" ({moe.num_experts_per_token} of {moe.num_experts} experts)"
    return {
        "parameters": f"{count.total:,}, active per token {count.active:,}"
        f"{chosen if count.active < count.total else ''}",
        "FLOPs": _flops(config),
        "device": _device(config, device),
        "precision": f"{config.train.precision}: {_PRECISIONS[config.train.precision]}",
        **({"idle stages": told} if told else {}),
    }


def _flops(config: RunConfig) -> str:
    train = config.train
    forward = sum(forward_flops_per_token(config.model, train.seq_length).values())
    tokens = train.global_batch_size * train.seq_length
    most = "at most " if config.data.reset_at_documents else ""
    return (
        f"{most}{_si(forward)}FLOP forward x 3 = {_si(3 * forward)}FLOP per trained token, x "
        f"{tokens:,} = {_si(3 * forward * tokens)}FLOP per step (without recomputation)"
    )


def _si(number: float) -> str:
    """Three digits and the SI prefix: ``12.3 M``."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    while number >= 999.5 and len(prefixes) > 1:
        number /= 1000
        del prefixes[0]
    return f"{number:.3g} {prefixes[0]}"


def _device(config: RunConfig, device: torch.device) -> str:
    wanted = config.train.device
    if device.type == "cpu":
        reason = " (auto: no CUDA here)" if wanted == "auto" else ""
        return f"cpu{reason}, gloo between processes"
    if not torch.cuda.is_available():
        return "cuda, which is not there on this machine"
    name = torch.cuda.get_device_name(device)
    return f"cuda, {name} ({torch.cuda.device_count()} here), NCCL between processes"
