"""A training step of the quickstart model in one process: Attention Residuals against the standard
residual, in fp32 on the CPU, on random tokens.

    python benchmarks/train_step.py

A step is forward and backward of every micro-batch, clipping and the optimizer's update. Every
round times each residual once, in turn; a ratio is the median over rounds. ``--profile`` shows
where the time of a micro-batch goes instead: the parts of block Attention Residuals next to those
of the standard residual, by torch's profiler, which makes small calls look dearer than they are.
``--qk-clip`` times instead the same step with QK-clip off and on, whose cost grows with the length
of the samples (``--seq-length``). ``--quick`` is a smoke run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from attnres_train.config import load_config
from attnres_train.model.batch import MicroBatch
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.init import init_weights
from attnres_train.model.parameters import parameter_rules
from attnres_train.model.qk_clip import row_factors, watched
from attnres_train.optim.build import build_optimizer
from attnres_train.optim.clipping import clip_factor, grad_square_sum, scale_grads
from attnres_train.pipeline.run.engine import Engine
from attnres_train.pipeline.run.transport import Mailboxes, MailboxTransport
from attnres_train.planning.build import build_plan
from chunks import keep_memory

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
ONE_PROCESS = [
    "parallel.pipeline_model_parallel_size=1",
    "parallel.virtual_pipeline_model_parallel_size=1",
]
CONTESTANTS = {
    "standard": ["model.residual.kind=standard"],
    "block": ["model.residual.kind=block"],
    "block, one read per sublayer": ["model.residual.two_phase=false"],
    "full": ["model.residual.kind=full"],
}
QK_CLIP = {"off": [], "on": ["optimizer.qk_clip=100"]}

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


class Run:
    """The quickstart model with ``overrides`` and its optimizer."""

    def __init__(self, overrides: list[str]) -> None:
        self.config = load_config(CONFIG, [*ONE_PROCESS, *overrides])
        model = self.config.model
        self.chunk = ModelChunk(model, 0, model.num_layers)
        init_weights(self.chunk, seed=0)
        named = dict(self.chunk.named_parameters())
        self.parameters = list(named.values())
        rules = parameter_rules(self.chunk)
        self.optimizer = build_optimizer(named.items(), rules, self.config.optimizer, "cpu")
        self.clipped = watched(self.chunk) if self.config.optimizer.qk_clip else {}
        transport = MailboxTransport(Mailboxes(timedelta(seconds=1)))
        plan = build_plan(self.config)
        self.engine = Engine({0: self.chunk}, plan, 0, transport, model.stream_size, torch.float32)

    def micro_batch(self) -> MicroBatch:
        shape = self.config.train.micro_batch_size, self.config.train.seq_length
        tokens = torch.randint(self.config.model.vocab_size, shape)
        return MicroBatch(tokens, tokens.roll(-1, 1), torch.ones(shape))

    def step(self, batches: list[MicroBatch]) -> None:
        self.engine.train_step(batches)
        norm = grad_square_sum(self.parameters).sqrt().item()
        scale_grads(self.parameters, clip_factor(norm, self.config.train.clip_grad))
        self.optimizer.step(self.config.optimizer.lr)
        for name, factors in row_factors(self.clipped, self.config.optimizer.qk_clip).items():
            self.optimizer.scale(name, factors)
        for layer in self.clipped.values():
            layer.max_logits.fill_(-torch.inf)
        self.optimizer.zero_grad()


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def seconds_by_part(run: Run, batch: MicroBatch) -> Counter[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run.engine.train_step([batch])
    spent = Counter()
    for event in profiler.events():
        owner = event
        while owner is not None and owner.name not in PARTS:
            owner = owner.cpu_parent
        spent[PARTS[owner.name] if owner else OTHER] += event.self_cpu_time_total / 1e6
    return spent


def print_profile(standard: Run, block: Run, batch: MicroBatch, rounds: int) -> None:
    parts = list(dict.fromkeys([*PARTS.values(), OTHER]))
    spent = [[seconds_by_part(run, batch) for run in (standard, block)] for _ in range(rounds)]
    total = statistics.median(own.total() for own, _ in spent)
    print("| part | standard, ms | block, ms | difference / standard |\n|---|---|---|---|")
    for part in parts:
        own = [statistics.median(pair[i][part] for pair in spent) for i in range(2)]
        more = statistics.median(b[part] - a[part] for a, b in spent) / total
        print(f"| {part} | {1000 * own[0]:.1f} | {1000 * own[1]:.1f} | {100 * more:+.1f} % |")


def print_times(runs: dict[str, Run], batches: list[MicroBatch], count: int, what: str) -> None:
    base = next(iter(runs))
    rounds = [
        {name: seconds(lambda run=run: run.step(batches)) for name, run in runs.items()}
        for _ in range(count)
    ]
    print(f"| {what} | median ms | time / {base} |\n|---|---|---|")
    for name in runs:
        own = statistics.median(r[name] for r in rounds)
        ratio = statistics.median(r[name] / r[base] for r in rounds)
        print(f"| {name} | {1000 * own:.0f} | {ratio:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--threads", type=int, default=1, help="1, as in the quickstart's processes"
    )
    parser.add_argument("--quick", action="store_true", help="one round of one micro-batch")
    parser.add_argument("--profile", action="store_true", help="where the time goes, by operator")
    parser.add_argument("--qk-clip", action="store_true", help="QK-clip off and on")
    parser.add_argument("--seq-length", type=int, help="tokens per sample (default: quickstart's)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_memory()
    contestants = QK_CLIP if args.qk_clip else CONTESTANTS
    names = ["standard", "block"] if args.profile else list(contestants)
    length = [f"train.seq_length={args.seq_length}"] if args.seq_length else []
    runs = {name: Run([*contestants[name], *length]) for name in names}
    train = runs[names[0]].config.train
    count = 1 if args.quick else train.global_batch_size // train.micro_batch_size
    batches = [runs[names[0]].micro_batch() for _ in range(count)]
    rounds = 1 if args.quick else args.rounds
    for run in runs.values():
        run.step(batches)  # warms up
    tokens = f"{train.micro_batch_size} x {train.seq_length} tokens"
    print(f"{count} micro-batches of {tokens}, {torch.get_num_threads()} threads\n")
    if args.profile:
        print_profile(runs["standard"], runs["block"], batches[0], rounds)
    else:
        print_times(runs, batches, rounds, "QK-clip" if args.qk_clip else "residual")


if __name__ == "__main__":
    main()
