"""The dtypes that `train.precision` stands for."""

from __future__ import annotations

import torch

PARAMETER_DTYPE = {
    "fp32": torch.float32,
    "bf16": torch.float32,
    "bf16_params": torch.bfloat16,
}
STREAM_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16_params": torch.bfloat16}


def autocast_dtype(precision: str) -> torch.dtype | None:
    """That of matmuls under torch.autocast; None: it is not used."""
    return torch.bfloat16 if precision == "bf16" else None
