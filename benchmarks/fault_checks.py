"""What watching over a step costs: what is done beside training, against a step of a small model.

    python benchmarks/fault_checks.py [--quick]

Each check runs by itself, many times, in one process with forward and backward pass of one sample
of the small model (less than any step). Reported is the share of that. The watching thread looks
once a second, whatever a step takes: its share is that of the time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from attnres_train.observe.dispatch import Observers
from attnres_train.observe.observer import Observer
from attnres_train.supervise.board import Board
from attnres_train.supervise.watch import POLL_SECONDS, Pulse
from attnres_train.training.nonfinite import Skips
from small_model import layout, make_batch, make_model


def small_step() -> Callable[[], object]:
    """Forward and backward of one sample through the whole small model."""
    chunk, batch = make_model(layout(1, 1, 2), 0), make_batch()
    return lambda: chunk(batch, {}, None, lambda block, tensor: None).loss.backward()


def seconds(work: Callable[[], object], times: int) -> float:
    """Of one call, the median of five rounds of ``times`` calls."""
    rounds = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(times):
            work()
        rounds.append((time.perf_counter() - started) / times)
    return statistics.median(rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run; figures mean nothing")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        board, pulse = Board(Path(folder), 0, store), Pulse()
        skips = Skips(3, {}, None)  # type: ignore[arg-type]  # asks nobody while all is finite
        observers = Observers([Observer(None, "log") for _ in range(4)])
        passes = 16  # of a step: 4 micro-batches, 2 chunks, both ways
        times = 100 if quick else 2000
        checks = {
            f"pulse, {passes} passes": passes * seconds(pulse.beat, times),
            "finite or not": seconds(lambda: skips.passes_over(1, 2.0, 1.0, True), times),
            "4 observers, 3 hooks": 3
            * seconds(lambda: observers.tell(Observer.on_step_begin, 1), times),
        }
        looking = seconds(board.failed, times // 10)
    step = seconds(small_step(), 1 if quick else 5)
    print(f"step of the small model: {1e3 * step:.1f} ms, one thread")
    for name, cost in checks.items():
        print(f"{name:24} {1e6 * cost:8.1f} us  {100 * cost / step:.4f} % of the step")
    share = looking / POLL_SECONDS
    print(f"{'watch, once a second':24} {1e6 * looking:8.1f} us  {100 * share:.4f} % of the time")
    print(f"{'all':24} {100 * (sum(checks.values()) / step + share):23.4f} %")


if __name__ == "__main__":
    main()
