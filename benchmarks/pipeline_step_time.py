"""Step time of the pipeline on links of limited bandwidth, by ways to carry the block history.

    python benchmarks/pipeline_step_time.py

Every rank is a gloo process in a network namespace of its own, in a ring of veth pairs shaped by
`tc tbf` (Linux, root and iproute2). Compute is a sleep of t forward and 2t backward, so that four
to eight ranks fit on two cores and the step shows communication alone. 54 sublayers in blocks of 6,
spread evenly over the chunks; a unit is an fp32 tensor of 512 KiB. With `--compute paced` a small
model computes in earnest and sleeps for what is left of t, as if an accelerator did it; t must be
long enough for that (`--milliseconds 100` for four ranks on two cores). With `--compute model` it
does not sleep; then t is what its passes take without any limit on the links, measured first, once
with the standard residual and once with the block reads of all others.

All contestants run side by side: a round times each of them once, the table has medians over
rounds, and a first round for each row, which opens connections, does not count.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import small_model
from attnres_train.model.chunk import ModelChunk
from attnres_train.pipeline.plan.layout import Layout
from attnres_train.pipeline.plan.messages import channels
from attnres_train.pipeline.run.engine import Engine
from attnres_train.pipeline.run.transport import P2PTransport
from chunks import Batch, SleepingChunk
from cluster import Cluster, Job, stop_on_signals
from contestants import PLANS, Row, table_head
from ring import what_is_missing
from torch_pipelining import make_stages, make_step

TOKENS, HIDDEN_SIZE = 128, 1024
UNIT_BYTES = TOKENS * HIDDEN_SIZE * 4
ROWS = [(4, 2, 8), (4, 2, 32), (4, 4, 16), (8, 2, 16)]
UNITS = [0, 1 / 8, 1 / 4, 1 / 2, 1]


class Worker:
    """One rank: builds contestants on demand and times their steps."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank = rank
        widest = Row(ranks, 2, ranks).plan("eager")
        self.transport = P2PTransport(channels(widest), [range(ranks)], timedelta(minutes=2))
        self.steps: dict[tuple[Row, str, float | None], Callable[[], Any]] = {}
        self.models: dict[tuple[Layout, float | None], dict[int, ModelChunk]] = {}

    def time_step(self, row: Row, name: str, seconds: float) -> tuple[float, float]:
        """When a step began and ended on this rank."""
        key = row, name, None if row.compute == "model" else seconds
        if key not in self.steps:
            self.steps[key] = self._make(*key)
        dist.barrier()
        start = time.monotonic()
        self.steps[key]()
        return start, time.monotonic()

    def _make(self, row: Row, name: str, seconds: float | None) -> Callable[[], Any]:
        plan = row.plan(name)
        own = plan.layout.chunks_of(self.rank)
        if row.compute == "sleep":
            hidden_size, batch = HIDDEN_SIZE, Batch(torch.zeros(1, TOKENS, dtype=torch.long))
            chunks = {chunk: SleepingChunk(plan, chunk, seconds, hidden_size) for chunk in own}
        else:
            hidden_size, batch = small_model.HIDDEN_SIZE, small_model.make_batch()
            models = self._models(plan.layout, seconds)
            chunks = {chunk: small_model.make_chunk(plan, chunk, models[chunk]) for chunk in own}
        batches = [batch] * row.micro_batches
        if name == "torch":
            return make_step(make_stages(plan, chunks, batch, hidden_size), batches)
        engine = Engine(chunks, plan, self.rank, self.transport, hidden_size, torch.float32)
        return lambda: engine.train_step(batches)

    def _models(self, layout: Layout, seconds: float | None) -> dict[int, ModelChunk]:
        """This rank's chunks of the small model. Contestants share them, so that none has its
        parameters at a luckier place in memory."""
        if (layout, seconds) not in self.models:
            own = layout.chunks_of(self.rank)
            models = {chunk: small_model.make_model(layout, chunk, seconds) for chunk in own}
            self.models[layout, seconds] = models
        return self.models[layout, seconds]


def job_of_a_worker(rank: int, ranks: int) -> Job:
    return Worker(rank, ranks).time_step


def measure(
    cluster: Cluster, row: Row, names: list[str], seconds: float, unit: float, repeats: int
) -> dict[str, float]:
    """Median step time by contestant, a unit costing ``unit`` chunks on a link."""
    cluster.ring.shape(UNIT_BYTES / (unit * seconds) if unit else None)
    rounds = [{name: cluster.run(row, name, seconds) for name in names} for _ in range(repeats)]
    return {name: statistics.median(times[name] for times in rounds) for name in names}


def measure_row(cluster: Cluster, row: Row, names: list[str], args: argparse.Namespace) -> None:
    seconds = args.milliseconds / 1e3
    measure(cluster, row, names, seconds, 0, 1)  # opens connections
    passes = dict.fromkeys(names, seconds)
    if row.compute == "model":
        free = measure(cluster, row, ["standard", "eager"], seconds, 0, args.repeats)
        models = {name: "standard" if name == "standard" else "eager" for name in names}
        passes = {name: free[model] / row.ideal(1) for name, model in models.items()}
    for unit in args.units:
        times = measure(cluster, row, names, passes["standard"], unit, args.repeats)
        print(row.report(passes, unit, times), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--milliseconds", type=float, default=32, help="t, of a forward pass")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", nargs="+", default=[",".join(map(str, row)) for row in ROWS])
    parser.add_argument("--units", type=float, nargs="+", default=UNITS, help="link time over t")
    parser.add_argument("--contestants", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--compute", choices=["sleep", "paced", "model"], default="sleep")
    parser.add_argument("--quick", action="store_true", help="a smoke run of one row")
    args = parser.parse_args()
    if args.quick:
        args.milliseconds, args.repeats, args.units = 5, 1, [1 / 4]
        args.rows = ["4,2,4" if args.compute == "sleep" else "2,1,2"]
    if missing := what_is_missing():
        print(f"pipeline_step_time needs {missing}")
        sys.exit(0 if args.quick else 2)
    stop_on_signals()
    names = list(dict.fromkeys(["standard", *args.contestants]))  # all are told relative to it
    rows = [Row(*map(int, row.split(",")), args.compute) for row in args.rows]
    print(table_head(names), flush=True)
    for ranks in sorted({row.ranks for row in rows}):
        with Cluster(ranks, job_of_a_worker, args.compute == "model") as cluster:
            for row in (row for row in rows if row.ranks == ranks):
                measure_row(cluster, row, names, args)


if __name__ == "__main__":
    main()
