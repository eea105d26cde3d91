"""Time and peak memory of KDA, forward + backward in fp32 on the CPU, against its peers.

    OMP_NUM_THREADS=2 python benchmarks/kda.py

Peers: the recurrence token by token in eager torch, and where installed attn-gym's reference
(`attn-gym`) and fla's naive chunked and recurrent forms (`fla-core` and `einops`; read from their
file alone, since the package itself needs Triton). Each round times every contestant once; a ratio
is the median over rounds. A second table shows the growth with T, in rounds that run the same
number of tokens at every T. Peak memory is what the process grows by (Linux).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from attnres_train.model.kda.operator import chunk_kda
from fla_source import fla_source

Operator = Callable[..., Tensor]


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """arXiv 2510.26692, Eq. 1, token by token."""
    state = v.new_zeros(*k.shape[::2], k.shape[3], v.shape[3])
    scale, outputs = k.shape[-1] ** -0.5, []
    for t in range(k.shape[1]):
        key = k[:, t].unsqueeze(-1)
        state = state * g[:, t].exp().unsqueeze(-1)
        update = beta[:, t, :, None] * (v[:, t] - (key * state).sum(-2))
        state = state + key * update.unsqueeze(-2)
        outputs.append((scale * q[:, t].unsqueeze(-1) * state).sum(-2))
    return torch.stack(outputs, dim=1)


def peers() -> dict[str, Operator]:
    """What there is to compare with, by name."""
    found: dict[str, Operator] = {"recurrence": recurrence}
    if importlib.util.find_spec("attn_gym"):
        from attn_gym.linear import chunk_kda as attn_gym_kda

        found["attn-gym"] = lambda *x: attn_gym_kda(*x, impl="reference")[0]
    if naive := fla_source("ops/kda/naive.py"):
        found["fla recurrent"] = lambda *x: naive.naive_recurrent_kda(*x)[0]
        found["fla chunked"] = lambda *x: naive.naive_chunk_kda(*x)[0]
    return found


def make_inputs(length: int, heads: int, size: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    shape = (1, length, heads, size)
    q, k, v = (torch.randn(shape, generator=rng) for _ in range(3))
    g = -0.3 * torch.rand(shape, generator=rng)
    beta = torch.rand(shape[:3], generator=rng)
    inputs = [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, g, beta]
    return [x.requires_grad_() for x in inputs]


def step(operator: Operator, inputs: list[Tensor], weight: Tensor) -> tuple[Tensor, ...]:
    o = operator(*inputs)
    return o, *torch.autograd.grad(o, inputs, weight)


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def memory(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` (its highest value) of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"no {field} in /proc/self/status: peak memory needs Linux")


def peak_bytes(function: Callable[[], object]) -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = memory("VmRSS")
    function()
    return memory("VmHWM") - before


def largest_error(operator: Operator, heads: int, size: int) -> float:
    """Of output and gradients against the recurrence in fp64, relative to the norm of each."""
    inputs = make_inputs(200, heads, size)
    weight = torch.randn_like(inputs[2])
    exact = [x.detach().double().requires_grad_() for x in inputs]
    pairs = zip(
        step(operator, inputs, weight), step(recurrence, exact, weight.double()), strict=True
    )
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def contest(
    operators: dict[str, Operator], length: int, heads: int, size: int, repeats: int
) -> None:
    """Prints, per operator: milliseconds, ratio of its time to ours, peak MiB."""
    inputs = make_inputs(length, heads, size)
    weight = torch.randn_like(inputs[2])
    runs = {name: partial(step, operator, inputs, weight) for name, operator in operators.items()}
    peaks = {name: peak_bytes(run) / 2**20 for name, run in runs.items()}
    rounds = [{name: seconds(run) for name, run in runs.items()} for _ in range(repeats)]
    for name in runs:
        ms = 1e3 * statistics.median(times[name] for times in rounds)
        ratio = statistics.median(times[name] / times["ours"] for times in rounds)
        print(f"| {length} | {name} | {ms:.0f} | {ratio:.2f} | {peaks[name]:.0f} |", flush=True)


def growth(operator: Operator, lengths: list[int], heads: int, size: int, repeats: int) -> None:
    """Prints, per T: microseconds per token, its ratio to that of the longest T, peak MiB."""
    longest = max(lengths)
    rounds: list[dict[int, float]] = [{} for _ in range(repeats)]
    runs, peaks = {}, {}
    for length in lengths:
        inputs = make_inputs(length, heads, size)
        runs[length] = partial(step, operator, inputs, torch.randn_like(inputs[2]))
        peaks[length] = peak_bytes(runs[length]) / 2**20
    for times in rounds:
        for length, run in runs.items():
            steps = longest // length
            times[length] = sum(seconds(run) for _ in range(steps)) / (steps * length)
    for length in lengths:
        us = 1e6 * statistics.median(times[length] for times in rounds)
        ratio = statistics.median(times[length] / times[longest] for times in rounds)
        print(f"| {length} | {us:.1f} | {ratio:.2f} | {peaks[length]:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--peer-lengths", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="key and value size per head")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="T = 64 and 128 once, a smoke run")
    args = parser.parse_args()
    if args.quick:
        args.lengths, args.peer_lengths, args.repeats = [64, 128], [64], 1

    ours = {"ours": lambda *x: chunk_kda(*x)[0]}
    shape = f"B=1 H={args.heads} K=V={args.size}"
    print(f"{shape}, fp32, forward + backward, {torch.get_num_threads()} threads")
    error = largest_error(ours["ours"], args.heads, args.size)
    print(f"largest error of output and gradients against fp64: {error:.1e}\n")
    print("| T | operator | ms | time / ours | peak MiB |")
    print("|---|---|---|---|---|")
    for length in args.peer_lengths:
        contest(ours | peers(), length, args.heads, args.size, args.repeats)
    print(f"\n| T | us / token | over that of T = {max(args.lengths)} | peak MiB |")
    print("|---|---|---|---|")
    growth(ours["ours"], args.lengths, args.heads, args.size, args.repeats)


if __name__ == "__main__":
    main()
