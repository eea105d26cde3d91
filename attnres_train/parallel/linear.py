"""Who makes a model's linear maps, those between gather and scatter (`train.backend`): torch, or
Transformer Engine where it is installed, or torch with apex's accumulation of gradients where that
is. What these gain has not been measured.

Its own class and not megatron-core's parallel layers of it: those gather and scatter by themselves,
once for each map, and take groups from megatron-core's globals.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from attnres_train.config.schema import TrainSection
from attnres_train.model.split import MakeLinear, plain_linear
from attnres_train.parallel.accumulation import Accumulate, accumulating_maps, apex_accumulation

logger = logging.getLogger(__name__)


def linear_maps(
    train: TrainSection,
    device: torch.device,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    find_accumulation: Callable[[], Accumulate] = apex_accumulation,
) -> MakeLinear:
    """What makes the maps under ``train.backend``: parameters of ``dtype``, products of
    ``autocast`` if that is one. ``auto`` takes Transformer Engine's on CUDA; where it is not
    installed, and parameters have 16 bits, torch's with what ``find_accumulation`` gives; either of
    them if a small one gives here what torch's does, and torch's else. Raises ImportError for
    ``te`` where it is not installed (`supervise.preflight` tells it before)."""
    if train.backend == "te":
        return engine_maps()
    if train.backend == "torch" or device.type != "cuda":
        return plain_linear
    try:
        name, made = "Transformer Engine", engine_maps()
    except (ImportError, OSError):  # not there, or not with libraries that it needs
        if dtype.itemsize != 2 or autocast is not None:
            return plain_linear
        try:
            name, made = "apex", accumulating_maps(find_accumulation())
        except (ImportError, OSError):
            return plain_linear
    if why := differs(made, device, dtype, autocast):
        logger.warning("train.backend auto: torch makes linear maps, %s's %s", name, why)
        return plain_linear
    return made


def engine_maps() -> MakeLinear:
    """Transformer Engine's."""
    from transformer_engine.pytorch import Linear

    return lambda features_in, features_out: Linear(features_in, features_out, bias=False)


def differs(
    make: MakeLinear, device: torch.device, dtype: torch.dtype, autocast: torch.dtype | None
) -> str:
    """What is wrong with a small map of ``make``, forward and backward, beside torch's; empty where
    nothing is."""
    try:
        plain, found = (_results(of, device, dtype, autocast) for of in (plain_linear, make))
    except Exception as error:  # whatever a library of some version and device comes to
        return f"fail ({type(error).__name__}: {error})"
    narrow = torch.bfloat16 in (dtype, autocast)
    for name, value in plain.items():
        off = ((found[name] - value).norm() / value.norm()).item()
        if not off < (0.03 if narrow else 0.003):  # fp32 may be TF32
            return f"give another {name} ({off:.1e} off)"
    return ""


def _results(
    make: MakeLinear, device: torch.device, dtype: torch.dtype, autocast: torch.dtype | None
) -> dict[str, Tensor]:
    """Of a map as a chunk has it: cast after it is made, with gradients of fp32 at least."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(64, 64, generator=generator).to(device) for _ in range(2))
    with torch.device(device):
        module = make(64, 64)
    parameter = module.get_parameter("weight")
    parameter.data = weight.to(dtype)
    parameter.grad_dtype = torch.promote_types(dtype, torch.float32)
    x = x.to(dtype).requires_grad_()
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        y = module(x)
    y.square().sum().backward()
    assert x.grad is not None and parameter.grad is not None, "a gradient is missing"
    gradients = {"gradient of the input": x.grad, "gradient of the weight": parameter.grad}
    return {name: value.detach().float() for name, value in {"output": y, **gradients}.items()}
