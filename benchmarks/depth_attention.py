"""Time and peak memory of depth attention, forward + backward on the CPU, against eager PyTorch.

    OMP_NUM_THREADS=2 python benchmarks/depth_attention.py

Two cases: one read of 9 sources, and the 6 reads of one block with 8 completed blocks before it.
Peers: the paper's pseudo-code (`einsum`), the same with products and sums (`eager`), the latter
compiled (`torch.compile`), and fla's `naive_attnres` where `fla-core` and `einops` are installed.
Each round times every contestant once, in one process with the CPU launcher's malloc settings; a
ratio is the median over rounds of the faster eager form's time to the contestant's. Peak memory is
what one forward + backward adds to the resident set (Linux), each in a process of its
own whose malloc returns memory at once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from attnres_train.model.depth.attention import depth_attention, depth_phase1, depth_phase2
from attnres_train.supervise.launcher import MALLOC_ENVIRONMENT
from fla_source import fla_source

Read = Callable[[Tensor, Tensor, list[Tensor]], Tensor]
EAGER = ("einsum", "eager")
COMPLETED, BLOCK_SIZE, READ_SOURCES = 8, 6, 9
RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16)}


def einsum_read(query: Tensor, weight: Tensor, sources: list[Tensor]) -> Tensor:
    """The pseudo-code of arXiv 2603.15031, Fig. 2."""
    values = torch.stack(sources)
    keys = F.rms_norm(values, weight.shape, weight, 1e-5)
    logits = torch.einsum("d,n...d->n...", query, keys)
    return torch.einsum("n...,n...d->...d", logits.softmax(0), values)


def eager_read(query: Tensor, weight: Tensor, sources: list[Tensor]) -> Tensor:
    values = torch.stack(sources)
    keys = F.rms_norm(values, weight.shape, weight, 1e-5)
    attention = (keys * query).sum(-1).softmax(0)
    return (attention.unsqueeze(-1) * values).sum(0)


def fla_reads(on_gpu: bool) -> dict[str, Read]:
    """fla's own reads, where it is installed."""
    found = {}
    if naive := fla_source("ops/attnres/naive.py"):
        found["fla naive"] = naive.naive_attnres
        if on_gpu:
            from fla.ops.attnres import fused_attnres

            found["fla fused"] = fused_attnres
    return {
        name: lambda query, weight, sources, read=read: read(query, sources, weight, rms_eps=1e-5)
        for name, read in found.items()
    }


class Case:
    """Inputs of one case, and its contestants: functions of no argument that give the outputs."""

    def __init__(
        self,
        name: str,
        tokens: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: str = "cpu",
        backend: str = "inductor",
    ) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=dtype, device=device)

        def leaves(count: int, *shape: int) -> list[Tensor]:
            return [random(*shape).requires_grad_() for _ in range(count)]

        torch.manual_seed(0)
        self.is_block, self.backend = name == "block", backend
        reads = BLOCK_SIZE if self.is_block else 1
        self.queries, self.weights = leaves(reads, hidden_size), leaves(reads, hidden_size)
        self.sources = leaves(COMPLETED if self.is_block else READ_SOURCES, tokens, hidden_size)
        self.partials = leaves(reads - 1, tokens, hidden_size)
        self.upstream = [random(tokens, hidden_size) for _ in range(reads)]
        self.leaves = [*self.queries, *self.weights, *self.sources, *self.partials]

    def contestants(self) -> dict[str, Callable[[], list[Tensor]]]:
        # One compiled function for two sizes of the source list: static shapes, compiled twice.
        compiled = torch.compile(eager_read, dynamic=False, backend=self.backend)
        reads = {"einsum": einsum_read, "eager": eager_read, "torch.compile": compiled}
        reads |= fla_reads(self.sources[0].is_cuda)
        found = {name: lambda read=read: self.each(read) for name, read in reads.items()}
        found["ours, one read each" if self.is_block else "ours"] = lambda: self.each(
            depth_attention
        )
        if self.is_block:
            found["ours, two-phase"] = self.two_phase
        return found

    def each(self, read: Read) -> list[Tensor]:
        extra = [[], *([partial] for partial in self.partials)]
        reads = zip(self.queries, self.weights, extra, strict=True)
        return [read(query, weight, [*self.sources, *more]) for query, weight, more in reads]

    def two_phase(self) -> list[Tensor]:
        pairs = list(zip(self.queries, self.weights, strict=True))
        first, *completed = depth_phase1(pairs, self.sources)
        outputs = [first.o]
        for partial in self.partials:
            outputs.append(depth_phase2(completed.pop(0), partial))
        return outputs

    def step(self, contestant: Callable[[], list[Tensor]]) -> float:
        """Seconds of one forward + backward."""
        self.drop_gradients()
        start = time.perf_counter()
        torch.autograd.backward(contestant(), self.upstream)
        if self.sources[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def drop_gradients(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None


def measure_times(case: Case, rounds: int) -> dict[str, list[float]]:
    contestants = case.contestants()
    for contestant in contestants.values():
        case.step(contestant)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            times[name].append(case.step(contestant))
    return times


def measure_memory(case: Case, name: str) -> float:
    """MiB that a step adds at its peak to what the inputs hold."""
    contestant = case.contestants()[name]
    case.step(contestant)
    case.drop_gradients()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the current use
    before = _status_kib("VmRSS")
    case.step(contestant)
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(key: str) -> int:
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def child(what: str, options: argparse.Namespace, case: str, malloc: dict[str, str]):
    """Runs this file for one measurement and reads its JSON."""
    size = [f"--tokens={options.tokens}", f"--hidden-size={options.hidden_size}"]
    rest = [
        f"--dtype={options.dtype}",
        f"--rounds={options.rounds}",
        f"--backend={options.backend}",
    ]
    command = [sys.executable, __file__, f"--measure={what}", f"--case={case}", *size, *rest]
    result = subprocess.run(command, env=os.environ | malloc, check=True, stdout=subprocess.PIPE)
    return json.loads(result.stdout.splitlines()[-1])


def report(case: str, options: argparse.Namespace) -> None:
    times = child("time", options, case, MALLOC_ENVIRONMENT)
    memory = {name: child(name, options, case, RETURN_AT_ONCE) for name in times}
    fastest = min(EAGER, key=lambda name: statistics.median(times[name]))
    print(f"\n| {case} | median ms | {fastest} / time | MiB | {fastest} / memory |")
    print("|---|---|---|---|---|")
    for name, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(times[fastest], seconds, strict=True))
        # A small case may fit into pages the process already holds: nothing to compare then.
        saved = f"{memory[fastest] / memory[name]:.2f}" if memory[name] else "-"
        milliseconds = 1e3 * statistics.median(seconds)
        print(f"| {name} | {milliseconds:.1f} | {ratio:.2f} | {memory[name]:.0f} | {saved} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--case", choices=["read", "block"], help="only this case")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--quick", action="store_true", help="one read of 64 tokens, a smoke run")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.hidden_size, options.rounds, options.case = 64, 32, 1, "read"
        options.backend = "aot_eager"  # nothing to compile in C++, which takes half a minute
    if options.measure is None:
        size = f"{options.tokens} tokens x {options.hidden_size}, {options.dtype}"
        print(f"{size}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        for case in [options.case] if options.case else ["read", "block"]:
            report(case, options)
        return
    sizes = options.tokens, options.hidden_size
    case = Case(options.case, *sizes, getattr(torch, options.dtype), backend=options.backend)
    if options.measure == "time":
        print(json.dumps(measure_times(case, options.rounds)))
    else:
        print(json.dumps(measure_memory(case, options.measure)))


if __name__ == "__main__":
    main()
