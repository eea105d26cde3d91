"""AdamW: torch's, with the options of a configuration."""

from __future__ import annotations

import torch
from torch import Tensor

from attnres_train.config.schema import OptimizerConfig


def make_adamw(
    params: list[Tensor], weight_decay: float, config: OptimizerConfig, device: torch.device | str
) -> torch.optim.AdamW:
    """AdamW over ``params``, fused on CUDA. torch creates its state in the first step."""
    return torch.optim.AdamW(
        params,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=weight_decay,
        fused=torch.device(device).type == "cuda" or None,
    )
