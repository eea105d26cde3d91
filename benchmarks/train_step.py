"""A training step of the quickstart model in one process: Attention Residuals against the standard
residual, forward + backward of one micro-batch in fp32 on the CPU.

    OMP_NUM_THREADS=2 python benchmarks/train_step.py

Every round times each residual once, in turn; a ratio is the median over rounds. ``--profile``
shows where the time of block Attention Residuals goes instead: its parts next to those of the
standard residual, by torch's profiler, which makes small calls look dearer than they are.
``--quick`` is a smoke run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from attnres_train.config import load_config
from attnres_train.model.batch import MicroBatch
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.init import init_weights

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
CONTESTANTS = {
    "standard": ["model.residual.kind=standard"],
    "block": ["model.residual.kind=block"],
    "block, one read per sublayer": ["model.residual.two_phase=false"],
    "full": ["model.residual.kind=full"],
}

PARTS = {
    "DepthPhase1": "phase 1, forward",
    "DepthPhase1Backward": "phase 1, backward",
    "DepthMerge": "phase 2, forward",
    "DepthMergeBackward": "phase 2, backward",
    "DepthRead": "plain reads, forward",
    "DepthReadBackward": "plain reads, backward",
    "aten::rms_norm": "norms, forward",
    "aten::add": "sums of outputs and of gradients",
    "aten::add_": "sums of outputs and of gradients",
}
"""What the profiler's events belong to, with all that happens within them."""
OTHER = "everything else"


def build(overrides: list[str]) -> ModelChunk:
    model = load_config(CONFIG, overrides).model
    chunk = ModelChunk(model, 0, model.num_layers)
    init_weights(chunk, seed=0)
    return chunk


def seconds(chunk: ModelChunk, batch: MicroBatch) -> float:
    chunk.zero_grad(set_to_none=True)
    started = time.perf_counter()
    chunk(batch, {}, None).loss.backward()
    return time.perf_counter() - started


def seconds_by_part(chunk: ModelChunk, batch: MicroBatch) -> Counter[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        seconds(chunk, batch)
    spent = Counter()
    for event in profiler.events():
        owner = event
        while owner is not None and owner.name not in PARTS:
            owner = owner.cpu_parent
        spent[PARTS[owner.name] if owner else OTHER] += event.self_cpu_time_total / 1e6
    return spent


def print_profile(standard: ModelChunk, block: ModelChunk, batch: MicroBatch, rounds: int) -> None:
    parts = list(dict.fromkeys([*PARTS.values(), OTHER]))
    spent = [[seconds_by_part(chunk, batch) for chunk in (standard, block)] for _ in range(rounds)]
    step = statistics.median(own.total() for own, _ in spent)
    print("| part | standard, ms | block, ms | difference / standard step |\n|---|---|---|---|")
    for part in parts:
        own = [statistics.median(pair[i][part] for pair in spent) for i in range(2)]
        more = statistics.median(b[part] - a[part] for a, b in spent) / step
        print(f"| {part} | {1000 * own[0]:.1f} | {1000 * own[1]:.1f} | {100 * more:+.1f} % |")


def print_times(chunks: dict[str, ModelChunk], batch: MicroBatch, count: int) -> None:
    rounds = [{name: seconds(chunk, batch) for name, chunk in chunks.items()} for _ in range(count)]
    print("| residual | median ms | time / standard |\n|---|---|---|")
    for name in chunks:
        own = statistics.median(r[name] for r in rounds)
        ratio = statistics.median(r[name] / r["standard"] for r in rounds)
        print(f"| {name} | {1000 * own:.0f} | {ratio:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="two rounds, a smoke run")
    parser.add_argument("--profile", action="store_true", help="where the time goes, by operator")
    args = parser.parse_args()
    config = load_config(CONFIG)
    shape = config.train.micro_batch_size, config.train.seq_length
    tokens = torch.randint(config.model.vocab_size, shape)
    batch = MicroBatch(tokens, tokens.roll(-1, 1), torch.ones(shape))
    chunks = {name: build(overrides) for name, overrides in CONTESTANTS.items()}
    for chunk in chunks.values():
        seconds(chunk, batch)
    count = 2 if args.quick else args.rounds
    print(f"{shape[0]} x {shape[1]} tokens, {torch.get_num_threads()} threads\n")
    if args.profile:
        print_profile(chunks["standard"], chunks["block"], batch, count)
    else:
        print_times(chunks, batch, count)


if __name__ == "__main__":
    main()
