"""What a run costs before its first step: processes that connect, files that are found, an index
that is opened, and the way back from a kill.

    python benchmarks/start_up.py processes   # connections of up to 64 processes
    python benchmarks/start_up.py files       # a corpus of 20,000 files
    python benchmarks/start_up.py documents   # an index of ten million documents
    python benchmarks/start_up.py kill        # from a kill to the next step

Each prints a table; where there is another way to do it, both are measured in one run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("meeting", "world", "grid", "control", "channels")
TIMEOUT = 300.0


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n")
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")
    sys.stdout.flush()


def connect(
    rank: int, world_size: int, stages: int, port: int, all_groups: bool, pipe: Any
) -> None:
    """Be one process: connect as a run does, and send the seconds of each of PARTS."""
    import torch.distributed as dist

    from attnres_train.config.schema import ParallelConfig
    from attnres_train.megatron import megatron_core
    from attnres_train.parallel.meeting import meet
    from attnres_train.parallel.megatron import build_groups, lay_out
    from attnres_train.pipeline.plan.messages import Channel
    from attnres_train.pipeline.run.transport import P2PTransport

    place = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    parallel = ParallelConfig(pipeline_model_parallel_size=stages)
    lay_out(parallel, world_size)  # what it imports takes longer than all the rest
    parallel_state = megatron_core("parallel_state")
    pipe.send("ready")
    pipe.recv()
    times = [time.perf_counter()]

    def done() -> None:
        times.append(time.perf_counter())

    with meet(TIMEOUT) as meeting:
        meeting.tell_own("place", rank)
        if rank == 0:
            meeting.hear_all("place", "to join")
            meeting.tell("go", 0)
        meeting.hear("go", "rank 0")
        done()
        store, timeout = dist.PrefixStore("groups", meeting.store), timedelta(seconds=TIMEOUT)
        dist.init_process_group("gloo", None, timeout, world_size, rank, store)
        done()
        grid = lay_out(parallel, world_size)
        if all_groups:
            parallel_state.initialize_model_parallel(
                pipeline_model_parallel_size=stages, create_gloo_process_groups=False
            )
        else:
            build_groups(grid, timeout)
        done()
        dist.new_group(backend="gloo", timeout=timeout)
        done()
        edges = [(a, b) for a in range(stages) for b in range(stages) if abs(a - b) == 1]
        channels = [Channel(a, b, "F" if b > a else "B") for a, b in edges]
        P2PTransport(channels, grid.pipelines, timeout)
        done()
        dist.barrier()
        pipe.send([after - before for before, after in pairwise(times)])
        pipe.recv()
        os._exit(0)


def connected(world_size: int, stages: int, all_groups: bool) -> list[float]:
    """Seconds of each of PARTS on the slowest process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "attnres_train.train"])
    pipes, port = [], free_port()
    for rank in range(world_size):
        here, there = context.Pipe()
        arguments = (rank, world_size, stages, port, all_groups, there)
        context.Process(target=connect, args=arguments, daemon=True).start()
        pipes.append(here)
    for pipe in pipes:
        pipe.recv()
    for pipe in pipes:
        pipe.send("go")
    rows = [pipe.recv() for pipe in pipes]
    for pipe in pipes:
        pipe.send("end")
    return [max(column) for column in zip(*rows, strict=True)]


def processes(counts: list[int], stages: int) -> None:
    rows = []
    for count in counts:
        before, now = (connected(count, stages, all_groups) for all_groups in (True, False))
        cells = [f"{seconds:.2f}" for seconds in now]
        cells[PARTS.index("grid")] += f" ({before[PARTS.index('grid')]:.2f})"
        rows.append([str(count), *cells, f"{sum(now):.2f} ({sum(before):.2f})"])
    title = f"Seconds to connect, {stages} stages; in brackets with megatron-core's groups"
    table(title, ["processes", *PARTS, "all"], rows)


def config(folder: Path, corpus: dict[str, Any], **tokenizer: Any) -> Any:
    from attnres_train.config.schema import RunConfig

    model = {"hidden_size": 32, "num_layers": 2, "vocab_size": 512}
    train = {"train_iters": 1, "seq_length": 64, "global_batch_size": 1, "device": "cpu"}
    data = {"corpus": [corpus], "tokenizer": tokenizer, "cache_dir": str(folder / "cache")}
    return RunConfig.model_validate({"model": model, "train": train, "data": data})


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def files(count: int) -> None:
    from attnres_train.data.loader import open_data
    from attnres_train.data.prepare import prepare
    from attnres_train.data.record import as_record, missing

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "texts").mkdir()
        for number in range(count):
            text = f"file {number} of a corpus of many small ones\n" * 20
            (folder / "texts" / f"{number:06d}.txt").write_text(text)
        run = config(folder, {"kind": "text", "path": str(folder / "texts")}, vocab_size=300)
        first, _ = timed(lambda: prepare(run, progress=False))
        again, prepared = timed(lambda: prepare(run, progress=False))
        record = as_record(prepared)
        other, _ = timed(lambda: (missing(record), open_data(run, prepared)))
    rows = [
        ["rank 0, first time", f"{first:.2f}"],
        ["rank 0, prepared before", f"{again:.2f}"],
        ["every other rank", f"{other:.2f}"],
    ]
    table(f"Seconds to step 1, {count:,} files", ["who", "seconds"], rows)


def in_process(work: Callable[..., None], *arguments: Any) -> tuple[float, float]:
    """Seconds, and GiB of memory at most beyond what was there before, in a process of its own."""
    here, there = multiprocessing.Pipe()

    def measure() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds, _ = timed(lambda: work(*arguments))
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        there.send((seconds, (after - before) / 2**20))

    process = multiprocessing.get_context("fork").Process(target=measure)
    process.start()
    found = here.recv()
    process.join()
    return found


def documents(count: int, tokens: int = 8) -> None:
    import numpy as np

    from attnres_train.data.indexed import HEADER, MAGIC, check_indexed
    from attnres_train.data.loader import open_data
    from attnres_train.data.prepare import prepare

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open(folder / "corpus.idx", "wb") as index:
            index.write(HEADER.pack(MAGIC, 1, 8, count, count + 1))
            index.write(np.full(count, tokens, np.int32).tobytes())
            index.write((np.arange(count, dtype=np.int64) * tokens * 2).tobytes())
            index.write(np.arange(count + 1, dtype=np.int64).tobytes())
        (np.arange(count * tokens, dtype=np.uint32) % 512).astype(np.uint16).tofile(
            folder / "corpus.bin"
        )
        run = config(folder, {"kind": "indexed", "path": str(folder / "corpus")}, kind="none")
        small = config(folder, tiny(folder), vocab_size=300)
        open_data(small, prepare(small, progress=False))  # what it imports takes longer
        first = in_process(lambda: prepare(run, progress=False))
        again = in_process(lambda: prepare(run, progress=False))
        prepared = prepare(run, progress=False)
        full = in_process(lambda: check_indexed(str(folder / "corpus")))
        other = in_process(lambda: open_data(run, prepared))
    rows = [
        [who, f"{seconds:.3f}", f"{memory:.2f}"]
        for who, (seconds, memory) in {
            "rank 0, first time": first,
            "rank 0, prepared before": again,
            "every other rank": other,
            "a check of the whole index, for comparison": full,
        }.items()
    ]
    table(f"To step 1, {count:,} documents in one index", ["who", "seconds", "GiB"], rows)


def tiny(folder: Path) -> dict[str, Any]:
    (folder / "tiny.txt").write_text("what is imported for data takes seconds\n" * 99)
    return {"kind": "text", "path": str(folder / "tiny.txt")}


def kill(steps: int = 4) -> None:
    """A run of two processes: one is killed, and the same command given again."""
    sys.path.insert(0, str(ROOT))
    from tests.tiny import command, environment, grid, records, write_config

    with tempfile.TemporaryDirectory() as name:
        path = write_config(Path(name))
        run = Path(name) / "runs" / "tiny"
        words = [*grid(2, 1), "train.train_iters=100000", "train.eval_interval=0"]
        words += ["checkpoint.save_interval=1"]

        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                command("train", path, *words),
                env=environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

        def wait_for(count: int) -> None:
            while not (run / "metrics.jsonl").exists() or len(records(run)) < count:
                time.sleep(0.02)

        first = start()
        from_nothing, _ = timed(lambda: wait_for(1))
        wait_for(steps)
        children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        noticed, _ = timed(first.wait)
        steps_made = len(records(run))
        second = start()
        resumed, _ = timed(lambda: wait_for(steps_made + 1))
        second.send_signal(signal.SIGTERM)
        second.wait()
    rows = [
        ["start to step 1, data to be prepared", f"{from_nothing:.1f}"],
        ["kill of a process to the end of the command", f"{noticed:.1f}"],
        ["the same command again to the next step", f"{resumed:.1f}"],
    ]
    table("Seconds around a kill, two processes", ["from", "seconds"], rows)


def free_port() -> int:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["processes", "files", "documents", "kill"])
    parser.add_argument("--counts", type=int, nargs="+", help="of processes, files or documents")
    parser.add_argument("--stages", type=int, default=4, help="of the pipeline")
    args = parser.parse_args()
    if args.what == "processes":
        processes(args.counts or [8, 16, 32, 64], args.stages)
    for count in (args.counts or [20_000]) if args.what == "files" else []:
        files(count)
    for count in (args.counts or [10_000_000]) if args.what == "documents" else []:
        documents(count)
    if args.what == "kill":
        kill()


if __name__ == "__main__":
    main()
