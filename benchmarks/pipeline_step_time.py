"""Step time of the pipeline on links of limited bandwidth, by ways to carry the block history.

    python benchmarks/pipeline_step_time.py

Every rank is a gloo process in a network namespace of its own, in a ring of veth pairs shaped by
`tc tbf` (Linux, root and iproute2). Compute is a sleep of t forward and 2t backward, so that four
to eight ranks fit on two cores and the step shows communication alone. 54 sublayers in blocks of 6,
spread evenly over the chunks; a unit is an fp32 tensor of 512 KiB. With `--compute model` a small
model computes in earnest; then t is what its passes take without any limit on the links.

All contestants run side by side: a round times each of them once, the table has medians over
rounds, and a first round for each row, which opens connections, does not count.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import small_model
from attnres_train.model.blocks import Blocks
from attnres_train.pipeline.engine import Engine
from attnres_train.pipeline.layout import Layout, even_bounds
from attnres_train.pipeline.messages import channels
from attnres_train.pipeline.plan import TransportPlan
from attnres_train.pipeline.schedule import one_f_one_b
from attnres_train.pipeline.simulate import Costs, simulate
from attnres_train.pipeline.transport import P2PTransport
from chunks import Batch, SleepingChunk, sleep_precisely
from ring import Ring, what_is_missing
from torch_pipelining import make_stages, make_step
from transports import LatePlan, NaivePlan, PaddedPlan

SUBLAYERS, BLOCK_SIZE = 54, 6
TOKENS, HIDDEN_SIZE = 128, 1024
UNIT_BYTES = TOKENS * HIDDEN_SIZE * 4
ROWS = [(4, 2, 8), (4, 2, 32), (4, 4, 16), (8, 2, 16)]
UNITS = [0, 1 / 8, 1 / 4, 1 / 2, 1]
# Contestant -> its transport plan, and the simulator's name for it.
PLANS: dict[str, tuple[type[TransportPlan], str | None]] = {
    "standard": (TransportPlan, "standard"),
    "torch": (TransportPlan, None),
    "naive": (NaivePlan, "naive"),
    "padded": (PaddedPlan, "padded"),
    "exact": (LatePlan, "exact"),
    "eager": (TransportPlan, "eager"),
}


@dataclass(frozen=True)
class Row:
    ranks: int
    virtual: int
    micro_batches: int
    sleeps: bool = True

    def layout(self, standard: bool) -> Layout:
        if not self.sleeps:
            block_size = None if standard else small_model.BLOCK_SIZE
            return small_model.layout(self.ranks, self.virtual, block_size)
        block_size = None if standard else BLOCK_SIZE
        bounds = even_bounds(SUBLAYERS, self.ranks * self.virtual)
        return Layout(Blocks(SUBLAYERS, block_size), bounds, self.ranks, sublayers_per_layer=1)

    def plan(self, name: str) -> TransportPlan:
        return PLANS[name][0](self.layout(name == "standard"))

    def ideal(self, seconds: float) -> float:
        """Of the standard residual on links that cost nothing."""
        return 3 * seconds * (self.virtual * self.micro_batches + self.ranks - 1)

    def simulated(self, name: str, seconds: float, unit: float) -> float | None:
        mode = PLANS[name][1]
        if mode is None:
            return None
        chunks = self.ranks * self.virtual
        costs = Costs([seconds] * chunks, [2 * seconds] * chunks, unit * seconds)
        schedule = one_f_one_b(self.ranks, self.virtual, self.micro_batches)
        plan = self.plan("eager")
        timeline = simulate(plan, schedule, costs, mode, record=False, port_per_neighbour=True)
        return timeline.seconds


class Worker:
    """One rank: builds contestants on demand and times their steps."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank = rank
        widest = Row(ranks, 2, ranks).plan("eager")
        self.transport = P2PTransport(channels(widest), [range(ranks)], timedelta(minutes=2))
        self.steps: dict[tuple[Row, str, float], Callable[[], Any]] = {}

    def time_step(self, row: Row, name: str, seconds: float) -> tuple[float, float]:
        """When a step began and ended on this rank."""
        key = row, name, seconds if row.sleeps else 0.0
        if key not in self.steps:
            self.steps[key] = self._make(*key)
        dist.barrier()
        start = time.monotonic()
        self.steps[key]()
        return start, time.monotonic()

    def _make(self, row: Row, name: str, seconds: float) -> Callable[[], Any]:
        plan = row.plan(name)
        own = plan.layout.chunks_of(self.rank)
        if row.sleeps:
            hidden_size, batch = HIDDEN_SIZE, Batch(torch.zeros(1, TOKENS, dtype=torch.long))
            chunks = {chunk: SleepingChunk(plan, chunk, seconds, hidden_size) for chunk in own}
        else:
            hidden_size, batch = small_model.HIDDEN_SIZE, small_model.make_batch()
            chunks = {chunk: small_model.make_chunk(plan.layout, chunk) for chunk in own}
        batches = [batch] * row.micro_batches
        if name == "torch":
            return make_step(make_stages(plan, chunks, batch, hidden_size), batches)
        engine = Engine(chunks, plan, self.rank, self.transport, hidden_size, torch.float32)
        return lambda: engine.train_step(batches)


def work(ring: Ring, rank: int, store: str, sleeps: bool, connection: Connection) -> None:
    """A worker's life: jobs from the connection until None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    os.environ["GLOO_SOCKET_IFNAME"] = ring.enter(rank)
    torch.set_num_threads(1)
    if sleeps:
        sleep_precisely()
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, ring.num_ranks), rank=rank, world_size=ring.num_ranks
    )
    worker = Worker(rank, ring.num_ranks)
    while (job := connection.recv()) is not None:
        connection.send(worker.time_step(*job))
    dist.destroy_process_group()


class Cluster:
    """Workers in a ring, for the length of a ``with`` block."""

    def __init__(self, ranks: int, sleeps: bool) -> None:
        self.ring, self.sleeps = Ring(ranks), sleeps
        self.workers: list[tuple[Any, Connection]] = []

    def __enter__(self) -> Cluster:
        self.ring.__enter__()
        self.folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("fork")
        store = str(Path(self.folder.name) / "store")
        for rank in range(self.ring.num_ranks):
            here, there = context.Pipe()
            process = context.Process(
                target=work, args=(self.ring, rank, store, self.sleeps, there), daemon=True
            )
            process.start()
            there.close()
            self.workers.append((process, here))
        return self

    def __exit__(self, *_: object) -> None:
        for process, _ in self.workers:
            process.kill()
            process.join()
        self.ring.__exit__()
        self.folder.cleanup()

    def step(self, row: Row, name: str, seconds: float) -> float:
        """Seconds of one step, over all ranks."""
        for _, connection in self.workers:
            connection.send((row, name, seconds))
        times = [connection.recv() for _, connection in self.workers]
        return max(end for _, end in times) - min(start for start, _ in times)

    def measure(
        self, row: Row, names: list[str], seconds: float, unit: float, repeats: int
    ) -> dict[str, float]:
        """Median step time by contestant, a unit costing ``unit`` chunks on a link."""
        self.ring.shape(UNIT_BYTES / (unit * seconds) if unit else None)
        rounds = [{name: self.step(row, name, seconds) for name in names} for _ in range(repeats)]
        return {name: statistics.median(times[name] for times in rounds) for name in names}


def report(row: Row, seconds: float, unit: float, times: dict[str, float]) -> str:
    """A line of the table: measured over the standard residual's, and (simulated)."""
    base = times["standard"]
    simulated = {name: row.simulated(name, seconds, unit) for name in times}
    cells = [f"{1e3 * base:.0f} ({1e3 * simulated['standard']:.0f})"]
    for name, time_ in times.items():
        if name == "standard":
            continue
        guess = simulated[name]
        note = f" ({guess / simulated['standard'] - 1:+.1%}, {guess / time_:.2f})" if guess else ""
        cells.append(f"{time_ / base - 1:+.1%}{note}")
    shape = f"{row.ranks}, {row.virtual}, {row.micro_batches}"
    return f"| {shape} | {unit:g} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--milliseconds", type=float, default=20, help="t, of a forward pass")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", nargs="+", default=[",".join(map(str, row)) for row in ROWS])
    parser.add_argument("--units", type=float, nargs="+", default=UNITS, help="link time over t")
    parser.add_argument("--contestants", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--compute", choices=["sleep", "model"], default="sleep")
    parser.add_argument("--quick", action="store_true", help="a smoke run of one row")
    args = parser.parse_args()
    if args.quick:
        args.milliseconds, args.repeats, args.units = 5, 1, [1 / 4]
        args.rows = ["4,2,4" if args.compute == "sleep" else "2,1,2"]
    if missing := what_is_missing():
        print(f"pipeline_step_time needs {missing}")
        sys.exit(0 if args.quick else 2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    seconds, names, sleeps = args.milliseconds / 1e3, args.contestants, args.compute == "sleep"
    if not sleeps:
        names = [name for name in names if PLANS[name][0] in (TransportPlan, LatePlan)]
    rows = [Row(*map(int, row.split(",")), sleeps) for row in args.rows]
    print(f"| P, V, M | unit / t | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")
    for ranks in sorted({row.ranks for row in rows}):
        with Cluster(ranks, sleeps) as cluster:
            for row in (row for row in rows if row.ranks == ranks):
                cluster.measure(row, names, seconds, 0, 1)  # opens connections
                if not sleeps:
                    free = cluster.measure(row, ["standard"], seconds, 0, args.repeats)
                    seconds = free["standard"] / row.ideal(1)
                for unit in args.units:
                    times = cluster.measure(row, names, seconds, unit, args.repeats)
                    print(report(row, seconds, unit, times), flush=True)


if __name__ == "__main__":
    main()
