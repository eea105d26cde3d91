"""Checkpoints as they were written before: torch.distributed.checkpoint and one manifest."""

from __future__ import annotations

import json
import warnings
import zlib
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from attnres_train.checkpoint.folders import step_name
from attnres_train.checkpoint.rng import rng_state


def save_old(folder: Path, step: int, tensors: dict[str, Tensor], extras: dict) -> Path:
    """What one process left in ``folder/step_<step>``."""
    path = folder / step_name(step)
    path.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    manifest = {
        "step": step,
        "serial": 1,
        "extras": extras,
        "rng": [rng_state()],
        "files": {file.name: file.stat().st_size for file in sorted(path.iterdir())},
        "tensors": {name: _entry(tensor) for name, tensor in tensors.items()},
        "format": 1,
    }
    (path / "meta.json").write_text(json.dumps(manifest))
    return path


def _entry(tensor: Tensor) -> list:
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return [list(tensor.shape), str(tensor.dtype).removeprefix("torch."), zlib.crc32(content)]
