"""Prefill and decode with caches: tokens per second against a full pass per token, and against the
same model with the standard residual; memory of a prefill by length.

    .venv/bin/python benchmarks/generation.py [--quick] [--device cuda]

Contestants run in turns in one process; numbers are medians over rounds. On the CPU they are CPU
time of one thread, to which other work on the machine adds little.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from attnres_train.config.model_schema import (
    KDAConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    ResidualConfig,
)
from attnres_train.inference.cache import Cache
from attnres_train.inference.decoding import CachedDecoder
from attnres_train.inference.prefill import PREFILL_TOKENS
from attnres_train.model.batch import MicroBatch
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.init import init_weights

VOCABULARY = 8192
RESIDUALS = {
    "standard": ResidualConfig(kind="standard", block_size=1),
    "block": ResidualConfig(kind="block", block_size=4),
    "full": ResidualConfig(kind="full", block_size=1),
}


def model(residual: str, layers: int, hidden: int, device: str) -> ModelChunk:
    config = ModelConfig(
        hidden_size=hidden,
        num_layers=layers,
        vocab_size=VOCABULARY,
        intermediate_size=2 * hidden,
        residual=RESIDUALS[residual],
        kda=KDAConfig(num_heads=hidden // 64, head_dim=64),
        mla=MLAConfig(
            num_heads=hidden // 64,
            kv_lora_rank=hidden // 4,
            qk_nope_head_dim=64,
            qk_rope_head_dim=32,
            v_head_dim=64,
        ),
        moe=MoEConfig(num_experts=8, num_experts_per_token=2, intermediate_size=hidden // 2),
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    chunk = ModelChunk(config, 0, layers, device=device, dtype=dtype)
    init_weights(chunk, seed=1)
    return chunk.requires_grad_(False).eval()


def prompt(length: int) -> list[int]:
    return torch.arange(length).mul(17).remainder(VOCABULARY).tolist()


def one_round(chunk: ModelChunk, length: int, args: argparse.Namespace) -> tuple[float, ...]:
    """Seconds of a prefill of ``length`` tokens, of a token after it, and of a full pass."""
    decoder, tokens = CachedDecoder.of(chunk), prompt(length)
    batch = MicroBatch.of_tokens(torch.tensor([tokens], device=args.device))

    def decode() -> None:
        for step in range(args.steps):
            decoder.step([step])

    with torch.no_grad():
        return (
            seconds(lambda: decoder.begin([tokens], args.steps), args.device),
            seconds(decode, args.device) / args.steps,
            seconds(lambda: chunk.logits(batch, {}, None), args.device),
        )


def seconds(work: Callable[[], object], device: str) -> float:
    clock = time.perf_counter if device == "cuda" else time.process_time
    started = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def speeds(args: argparse.Namespace) -> None:
    chunks = {name: model(name, args.layers, args.hidden, args.device) for name in RESIDUALS}
    print(
        "| context | residual | prefill, tokens/s | decode, ms per token | of standard "
        "| full pass, ms |\n|---|---|---|---|---|---|"
    )
    for length in args.lengths:
        rounds: dict[str, list[tuple[float, ...]]] = {name: [] for name in chunks}
        for turn in range(args.rounds + 1):
            for name, chunk in chunks.items():
                found = one_round(chunk, length, args)
                rounds[name] += [found] if turn else []  # the first warms up
        medians = {
            name: [statistics.median(column) for column in zip(*found, strict=True)]
            for name, found in rounds.items()
        }
        for name, (prefill, decode, whole) in medians.items():
            print(
                f"| {length} | {name} | {length / prefill:,.0f} | {1e3 * decode:.2f} "
                f"| {decode / medians['standard'][1]:.3f} | {1e3 * whole:.1f} |",
                flush=True,
            )


def peak_bytes(args: argparse.Namespace, length: int) -> tuple[int, int]:
    """Bytes that a prefill of ``length`` tokens adds to the process at its peak, and those of its
    cache. On the CPU in a process of its own."""
    chunk = model("block", args.layers, args.hidden, args.device)
    decoder = CachedDecoder.of(chunk)
    decoder.begin([prompt(PREFILL_TOKENS)], 1)  # what is there once
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
    if args.whole:
        with torch.no_grad():
            tokens = torch.tensor([prompt(length)], device=args.device)
            chunk.go_on(MicroBatch.of_tokens(tokens), {}, None, Cache(range(args.layers)).pasts)
    else:
        decoder.begin([prompt(length)], 1)
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated() - before, decoder.cache_bytes
    return resident("VmHWM") - before, decoder.cache_bytes


def resident(which: str) -> int:
    """Bytes of this process in memory: now (VmRSS), or at the peak (VmHWM). Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return int(line.split()[1]) * 1024
    raise LookupError(which)


def memory(args: argparse.Namespace) -> None:
    print("\n| prompt | in passes of 512, MiB | its cache, MiB | in one pass, MiB |")
    print("|---|---|---|---|")
    for length in args.lengths:
        found = []
        for more in ([], ["--whole"]):
            words = [
                sys.executable,
                __file__,
                "--peak",
                str(length),
                "--device",
                args.device,
                *more,
            ]
            words += ["--layers", str(args.layers), "--hidden", str(args.hidden)]
            out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            found.append([int(number) for number in out.split()])
        (passes, cache), (whole, _) = found
        print(f"| {length} | {passes / 2**20:.1f} | {cache / 2**20:.1f} | {whole / 2**20:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--steps", type=int, default=32, help="tokens decoded in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.layers, args.hidden, args.lengths, args.steps, args.rounds = 4, 128, [64], 2, 1
    torch.set_num_threads(1)
    if args.peak:
        print(*peak_bytes(args, args.peak))
        return
    speeds(args)
    memory(args)


if __name__ == "__main__":
    main()
