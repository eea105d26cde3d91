"""What the device can do and how much memory a process uses."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import sys

import torch

from attnres_train.config.secrets import without_secrets

# Dense bf16 FLOP/s by the name CUDA reports; the vendor's data sheets, without sparsity.
PEAK_BF16_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}
RECORDED_PACKAGES = (
    "attnres-train",
    "torch",
    "numpy",
    "megatron-core",
    "transformer-engine",
    "fla-core",
    "apex",
    "triton",
    "wandb",
)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of ``device``; None where it is not known: no MFU rather than a guess."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_BF16_FLOPS.items() if key in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory use so far: of the allocator on CUDA, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: torch.device, world_size: int) -> dict:
    """Versions and machine, saved beside a run's metrics."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed_version(name) for name in RECORDED_PACKAGES},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "world_size": world_size,
        "threads_per_process": torch.get_num_threads(),
        "command": without_secrets(sys.argv),
    }
