"""Time, peak memory and bandwidth of depth attention on a GPU, in the cases of `depth_attention`.

    python benchmarks/depth_attention_gpu.py

Forward + backward of one read and of one block: ratios are medians over rounds in which every
contestant runs once, peak memory is what one step allocates beside its inputs. Then forward and
backward of either phase alone, and what share of the device's copy bandwidth they reach, counting
every input read and every output written once. ``--device cpu`` runs the same without a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from attnres_train.model.depth.attention import Phase1, depth_phase1, depth_phase2
from depth_attention import BLOCK_SIZE, COMPLETED, EAGER, Case, measure_times


def report_case(name: str, options: argparse.Namespace) -> None:
    case = make_case(name, options)
    times, contestants = measure_times(case, options.rounds), case.contestants()
    fastest = min(EAGER, key=lambda name: statistics.median(times[name]))
    memory = {name: peak_mib(case, contestants[name]) for name in times}
    print(f"\n| {name} | median ms | {fastest} / time | MiB | {fastest} / memory |")
    print("|---|---|---|---|---|")
    for contestant, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(times[fastest], seconds, strict=True))
        mib = memory[contestant]
        saved = f"{mib:.0f} | {memory[fastest] / mib:.2f}" if mib else "- | -"
        print(f"| {contestant} | {1e3 * statistics.median(seconds):.2f} | {ratio:.2f} | {saved} |")


def make_case(name: str, options: argparse.Namespace) -> Case:
    dtype = getattr(torch, options.dtype)
    return Case(name, options.tokens, options.hidden_size, dtype, options.device)


def peak_mib(case: Case, contestant: Callable[[], list[Tensor]]) -> float:
    """0 without a GPU: the resident set is what `depth_attention` measures there."""
    if not case.sources[0].is_cuda:
        return 0.0
    case.drop_gradients()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.step(contestant)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def report_bandwidth(options: argparse.Namespace) -> None:
    case = make_case("block", options)
    tensor_bytes = case.sources[0].nbytes
    many = torch.cat([source.detach() for source in case.sources])  # larger than any cache
    copied, rounds = torch.empty_like(many), options.rounds
    copy = 2 * many.nbytes / seconds(lambda: copied.copy_(many), rounds, options.device)
    print(f"\ncopy bandwidth {copy / 1e9:.0f} GB/s\n")
    print("| | ms | GB/s | of copy |")
    print("|---|---|---|---|")
    for name, (function, tensors) in phases(case).items():
        took = seconds(function, rounds, options.device)
        rate = tensors * tensor_bytes / took
        print(f"| {name} | {1e3 * took:.3f} | {rate / 1e9:.0f} | {rate / copy:.0%} |")


def phases(case: Case) -> dict[str, tuple[Callable[[], object], int]]:
    """Each as a function and the number of [tokens, D] tensors that it has to read or write."""
    pairs = list(zip(case.queries, case.weights, strict=True))
    reads = depth_phase1(pairs, case.sources)
    merge_inputs = [x.detach().requires_grad_() for x in (*reads[1][:3], case.partials[0])]
    completed, partial = Phase1(*merge_inputs[:3], reads[1].logits), merge_inputs[3]
    merged = depth_phase2(completed, partial)
    outputs, inputs = [read.o for read in reads], [*case.queries, *case.weights, *case.sources]

    def backward(outputs: list[Tensor], inputs: list[Tensor]) -> Callable[[], object]:
        upstream = case.upstream[: len(outputs)]
        return lambda: torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)

    return {
        "phase 1 forward": (lambda: depth_phase1(pairs, case.sources), COMPLETED + BLOCK_SIZE),
        "phase 1 backward": (backward(outputs, inputs), 2 * COMPLETED + BLOCK_SIZE),
        "phase 2 forward": (lambda: depth_phase2(completed, partial), 3),
        "phase 2 backward": (backward([merged], merge_inputs), 5),
    }


def seconds(function: Callable[[], object], rounds: int, device: str) -> float:
    """Median over ``rounds``, after two calls that compile and warm up."""
    for _ in range(2):
        function()
    timed = gpu_seconds if device == "cuda" else cpu_seconds
    return statistics.median(timed(function) for _ in range(rounds))


def gpu_seconds(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1_000_000)  # work for the GPU while the calls are put into its queue
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden-size", type=int, default=2304, help="of the 48B model")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--quick", action="store_true", help="one read of 64 tokens on the CPU, a smoke run"
    )
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.hidden_size, options.rounds, options.device = 64, 32, 1, "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU: pass --device cpu, or run benchmarks/depth_attention.py")
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    size = f"{options.tokens} tokens x {options.hidden_size}, {options.dtype}"
    print(f"{size}, {name}, torch {torch.__version__}")
    for case in ("read",) if options.quick else ("read", "block"):
        report_case(case, options)
    report_bandwidth(options)


if __name__ == "__main__":
    main()
