"""What the pipeline itself costs: bytes on the wire, stored blocks, time of engine and planner.

    python benchmarks/pipeline_machinery.py

All of it is measured on chunks that compute nothing. Wire and store: ranks are threads with
in-memory mailboxes between them. The engine's time is the CPU time of one rank alone, whose peers
are replaced by a transport that is done at once. torch.distributed.pipelining, whose receive
buffers the store is compared with, runs the same chunks on gloo processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from attnres_train.model.blocks import Blocks
from attnres_train.pipeline.plan.layout import Layout, even_bounds
from attnres_train.pipeline.plan.program import Channel, Program
from attnres_train.pipeline.plan.schedule import one_f_one_b
from attnres_train.pipeline.plan.transport_plan import TransportPlan, lower_bound
from attnres_train.pipeline.plan.validate import validate
from attnres_train.pipeline.run.engine import Engine, StepResult
from attnres_train.pipeline.run.transport import Mailboxes, MailboxTransport
from chunks import Batch, SleepingChunk
from torch_pipelining import buffer_bytes, make_stages, make_step

TOKENS, HIDDEN_SIZE = 4, 8
UNIT_BYTES = TOKENS * HIDDEN_SIZE * 4
SUBLAYERS = 54
GRID = [(2, 1), (4, 1), (4, 2), (3, 3), (4, 4), (8, 2), (8, 4)]
BLOCK_SIZES = [1, 4, 6, 9, None]


def make_layout(ranks: int, virtual: int, block_size: int | None, sublayers: int) -> Layout:
    bounds = even_bounds(sublayers, ranks * virtual)
    return Layout(Blocks(sublayers, block_size), bounds, ranks, sublayers_per_layer=1)


def batches(count: int) -> list[Batch]:
    return [Batch(torch.zeros(1, TOKENS, dtype=torch.long)) for _ in range(count)]


def idle_chunks(plan: TransportPlan, rank: int) -> dict[int, SleepingChunk]:
    chunks = plan.layout.chunks_of(rank)
    return {chunk: SleepingChunk(plan, chunk, 0.0, HIDDEN_SIZE) for chunk in chunks}


class DoneAtOnce:
    """A transport without peers: what is sent is gone, and zeros are there when asked for. It is
    its own work."""

    bytes_sent = 0

    def send(self, channel: Channel, tensor: Tensor) -> DoneAtOnce:
        self.bytes_sent += tensor.nbytes
        return self

    def receive(self, channel: Channel, buffer: Tensor) -> DoneAtOnce:
        buffer.zero_()
        return self

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        pass


def step(plan: TransportPlan, micro_batches: int) -> list[StepResult]:
    """A training step's result on each rank."""
    mailboxes = Mailboxes(timedelta(minutes=1))

    def run(rank: int) -> StepResult:
        chunks, transport = idle_chunks(plan, rank), MailboxTransport(mailboxes)
        engine = Engine(chunks, plan, rank, transport, HIDDEN_SIZE, torch.float32)
        return engine.train_step(batches(micro_batches))

    ranks = plan.layout.num_ranks
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


def report_wire(grid: list[tuple[int, int]], sublayers: int) -> None:
    ratios = []
    for ranks, virtual in grid:
        for block_size in BLOCK_SIZES:
            layout = make_layout(ranks, virtual, block_size, sublayers)
            plan, micro_batches = TransportPlan(layout), ranks + 1
            results = step(plan, micro_batches)
            sent = sum(result.p2p_bytes for result in results)
            ratios.append(sent / (2 * micro_batches * lower_bound(layout) * UNIT_BYTES))
            planned = validate(plan, one_f_one_b(ranks, virtual, micro_batches)).peak_blocks
            if planned != tuple(result.peak_blocks for result in results):
                raise SystemExit(f"{ranks} x {virtual}: peak blocks are not the plan's {planned}")
    print(f"{len(ratios)} layouts: bytes on the wire / bound {min(ratios):.3f}..{max(ratios):.3f},")
    print("most blocks stored on each rank = the plan's figure\n")


def cpu_seconds(function: Callable[[], object], rounds: int) -> float:
    """Least CPU time of a call: other work on the machine only ever adds to it."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def engine_step(plan: TransportPlan, rank: int, micro_batches: int) -> Callable[[], object]:
    chunks, inputs = idle_chunks(plan, rank), batches(micro_batches)
    engine = Engine(chunks, plan, rank, DoneAtOnce(), HIDDEN_SIZE, torch.float32)
    return lambda: engine.train_step(inputs)


def chunk_passes(plan: TransportPlan, chunk: int) -> Callable[[], object]:
    """A forward and a backward pass of a chunk that computes nothing, without the engine."""
    module, batch = SleepingChunk(plan, chunk, 0.0, HIDDEN_SIZE), batches(1)[0]
    hop, shape = plan.hop_into(chunk), (1, TOKENS, HIDDEN_SIZE)
    partial = torch.zeros(shape, requires_grad=True) if hop and hop.partial else None
    blocks = {block: torch.zeros(shape, requires_grad=True) for block in plan.reads(chunk)}

    def passes() -> None:
        output = module(batch, blocks, partial)
        made = [*output.blocks.values(), output.partial, output.loss]
        made = [tensor for tensor in made if tensor is not None]
        torch.autograd.backward(made, [torch.zeros_like(tensor) for tensor in made])

    return passes


def report_engine(rows: list[tuple[int, int, int]], sublayers: int, rounds: int) -> None:
    """Means over ranks (and chunks) of the least CPU time in any round."""
    print("| P, V, M | messages per action | engine, us per action | chunk of no compute, us |")
    print("|---|---|---|---|")
    for ranks, virtual, micro_batches in rows:
        plan = TransportPlan(make_layout(ranks, virtual, 6, sublayers))
        actions = 2 * virtual * micro_batches
        steps = [engine_step(plan, rank, micro_batches) for rank in range(ranks)]
        total = statistics.mean(cpu_seconds(step, rounds) for step in steps) / actions
        passes = [chunk_passes(plan, chunk) for chunk in range(ranks * virtual)]
        chunk = statistics.mean(cpu_seconds(pair, 10 * rounds) for pair in passes) / 2
        messages = 2 * plan.units().exact / (ranks * virtual)
        row = f"{ranks}, {virtual}, {micro_batches} | {messages:.1f}"
        print(f"| {row} | {1e6 * (total - chunk):.0f} | {1e6 * chunk:.0f} |", flush=True)
    print()


def torch_buffers(rank: int, store: str, row: tuple[int, int, int], sublayers: int, queue) -> None:
    ranks, virtual, micro_batches = row
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    plan = TransportPlan(make_layout(ranks, virtual, 6, sublayers))
    inputs = batches(micro_batches)
    stages = make_stages(plan, idle_chunks(plan, rank), inputs[0], HIDDEN_SIZE)
    make_step(stages, inputs)()
    queue.put(buffer_bytes(stages))
    dist.barrier()
    dist.destroy_process_group()


def report_memory(rows: list[tuple[int, int, int]], sublayers: int) -> None:
    print("| P, V, M | store's peak, units | receive buffers of torch pipelining, units |")
    print("|---|---|---|")
    context = multiprocessing.get_context("fork")
    for row in rows:
        ranks, virtual, micro_batches = row
        queue = context.Queue()
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            processes = [
                context.Process(
                    target=torch_buffers, args=(rank, store, row, sublayers, queue), daemon=True
                )
                for rank in range(ranks)
            ]
            for process in processes:
                process.start()
            theirs = max(queue.get(timeout=120) for _ in processes) / UNIT_BYTES
            for process in processes:
                process.join()
        plan = TransportPlan(make_layout(ranks, virtual, 6, sublayers))
        ours = max(validate(plan, one_f_one_b(*row)).peak_blocks)
        print(f"| {ranks}, {virtual}, {micro_batches} | {ours} | {theirs:.0f} |", flush=True)
    print()


def report_planner(ranks: int, virtual: int, micro_batches: int) -> None:
    start = time.perf_counter()
    layout = make_layout(ranks, virtual, 6, 2 * ranks * virtual)
    plan, schedule = TransportPlan(layout), one_f_one_b(ranks, virtual, micro_batches)
    made = time.perf_counter()
    program = Program(plan, schedule, ranks // 2)
    receives = sum(len(step.posted) for step in program.steps)
    end = time.perf_counter()
    print(
        f"P={ranks} V={virtual} M={micro_batches}: plan and schedule {made - start:.2f} s, proof "
        f"and one rank's program of {len(program.steps)} actions and {receives} receives "
        f"{end - made:.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, grid, planner = [(4, 2, 8), (4, 2, 32), (4, 4, 16), (8, 2, 16)], GRID, (128, 8, 256)
    rounds = args.rounds
    if args.quick:
        rows, grid, planner, rounds = [(2, 2, 4)], [(2, 2), (3, 1)], (16, 4, 32), 2
    report_memory(rows, SUBLAYERS)  # forks, so before there are threads
    report_wire(grid, SUBLAYERS)
    report_engine(rows, SUBLAYERS, rounds)
    report_planner(*planner)


if __name__ == "__main__":
    main()
