"""A training step of the quickstart model in one process: Attention Residuals against the standard
residual, forward + backward of one micro-batch in fp32 on the CPU.

    OMP_NUM_THREADS=2 python benchmarks/train_step.py

Every round times each residual once, in turn; a ratio is the median over rounds. ``--quick`` is a
smoke run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="two rounds, a smoke run")
    args = parser.parse_args()
    config = load_config(CONFIG)
    shape = config.train.micro_batch_size, config.train.seq_length
    tokens = torch.randint(config.model.vocab_size, shape)
    batch = MicroBatch(tokens, tokens.roll(-1, 1), torch.ones(shape))
    chunks = {name: build(overrides) for name, overrides in CONTESTANTS.items()}
    for chunk in chunks.values():
        seconds(chunk, batch)
    rounds = [
        {name: seconds(chunk, batch) for name, chunk in chunks.items()}
        for _ in range(2 if args.quick else args.rounds)
    ]
    print(f"{shape[0]} x {shape[1]} tokens, {torch.get_num_threads()} threads\n")
    print("| residual | median ms | time / standard |\n|---|---|---|")
    for name in CONTESTANTS:
        own = statistics.median(r[name] for r in rounds)
        ratio = statistics.median(r[name] / r["standard"] for r in rounds)
        print(f"| {name} | {1000 * own:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
