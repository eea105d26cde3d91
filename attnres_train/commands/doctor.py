"""`attnres-train doctor`: what is installed, what will be used, and what a lack costs."""

from __future__ import annotations

import argparse
import platform

import torch

from attnres_train.observe.hardware import installed_version, peak_flops

# package -> (what it is used for, what happens without it)
OPTIONAL = {
    "fla-core": ("KDA and depth-attention kernels on GPUs", "torch operators, slower on GPUs"),
    "transformer-engine": ("fused linear and norm on GPUs", "torch operators"),
    "wandb": ("log.wandb", "metrics.jsonl and the console remain"),
    "tensorboard": ("log.tensorboard", "metrics.jsonl and the console remain"),
    "matplotlib": ("the loss plot", "no picture"),
    "pyarrow": ("Parquet corpora", "JSONL and text remain"),
    "tiktoken": ("tiktoken tokenizers", "tokenizer.json and trained BPE remain"),
    "zlib-ng": ("checksums of checkpoints", "zlib's, several times slower"),
    "sentencepiece": ("SentencePiece tokenizers", "tokenizer.json and trained BPE remain"),
}
REQUIRED = ("torch", "megatron-core", "numpy", "pyyaml", "pydantic", "tokenizers", "safetensors")


def run(args: argparse.Namespace) -> int:
    """Print the state of this machine. Returns 1 when a required package is missing, else 0."""
    print(f"python {platform.python_version()} on {platform.platform()}")
    _print_devices()
    missing = []
    for package in REQUIRED:
        version = installed_version(package)
        print(f"  {package:<20} {version or 'MISSING: pip install ' + package}")
        missing += [] if version else [package]
    print("optional:")
    for package, (use, without) in OPTIONAL.items():
        version = installed_version(package)
        if version:
            print(f"  {package:<20} {version}: {use}")
        else:
            print(f"  {package:<20} not installed ({use}): {without}")
    return 1 if missing else 0


def _print_devices() -> None:
    if not torch.cuda.is_available():
        print(f"no CUDA: CPU with {torch.get_num_threads()} threads, gloo, no MFU")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        peak = peak_flops(device)
        known = f"{peak / 1e12:.0f} TFLOP/s bf16" if peak else "peak unknown, so no MFU"
        print(f"cuda:{index} {torch.cuda.get_device_name(device)}: {known}")
