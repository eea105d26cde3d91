"""What it costs to look at a step: observed steps and others in turns, in one run.

    python benchmarks/observation.py [--quick] [--config quickstart] [KEY=VALUE ...]

Each observed step has the probe in its first micro-batch, the gather, and the arrays written into a
run folder. Reported are the ratio of the medians, for each kind of residual, and what is left of it
over `observe.interval` steps; pictures for TensorBoard, which limit themselves to a hundredth of
the time, are drawn apart.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from attnres_train.config import load_config
from attnres_train.config.schema import RunConfig
from attnres_train.data.prepare import prepare
from attnres_train.observe.observer import Observer
from attnres_train.observe.pictures import pictures, pixels
from attnres_train.parallel.meeting import meet
from attnres_train.parallel.ranks import join_run
from attnres_train.supervise.watch import Pulse
from attnres_train.training.building import build_parts
from attnres_train.training.trainer import Trainer


def one_step(trainer: Trainer, look: bool) -> float:
    """Seconds of the next step of ``trainer``, and of what is done with what it shows."""
    step = trainer.progress.step + 1
    trainer.observation.last_step = step if look else None
    started = time.perf_counter()
    trainer.train_step()
    if trainer.observed is not None:
        trainer.parts.observers.tell(Observer.on_observation, step, trainer.observed)
    return time.perf_counter() - started


def measure(config: RunConfig, rounds: int) -> tuple[float, float, float]:
    """Median seconds of a step, of an observed one, and of the pictures."""
    with meet(300) as meeting, join_run(config, meeting) as ranks:
        parts = build_parts(config, ranks, prepare(config, progress=False), Pulse())
        trainer = Trainer(config, ranks, parts)
        plain, observed = [], []
        with parts.observers.watching(0):
            for round_ in range(-1, rounds):  # the first one warms up
                pair = [one_step(trainer, look=False), one_step(trainer, look=True)]
                if round_ >= 0:
                    plain.append(pair[0])
                    observed.append(pair[1])
        drawn = []
        for _ in range(2):  # the first one imports and looks for fonts
            started = time.perf_counter()
            for figure in pictures(Path(config.run.dir) / config.run.name).values():
                pixels(figure)
            drawn.append(time.perf_counter() - started)
    return statistics.median(plain), statistics.median(observed), drawn[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run; figures mean nothing")
    parser.add_argument("--config", default="quickstart", help="YAML file, or the name of one")
    args, overrides = parser.parse_known_args()
    parallel = "parallel.{}pipeline_model_parallel_size=1"
    alone = [parallel.format(""), parallel.format("virtual_"), "log.progress=off"]
    small = ["train.global_batch_size=2", "train.seq_length=32", "model.hidden_size=16"]
    rounds = 1 if args.quick else 15
    print("residual   step        observed      ratio   over 100 steps   pictures")
    for kind in ("standard", "block", "full"):
        with tempfile.TemporaryDirectory() as folder:
            words = [f"run.dir={folder}", f"model.residual.kind={kind}", "observe.interval=100"]
            words += [*(small if args.quick else []), *alone, *overrides]
            plain, observed, drawn = measure(load_config(args.config, words), rounds)
        ratio = observed / plain
        print(
            f"{kind:9} {1e3 * plain:7.1f} ms  {1e3 * observed:8.1f} ms  {ratio:7.3f}"
            f"   {ratio - 1:12.3f} %   {1e3 * drawn:8.0f} ms"
        )


if __name__ == "__main__":
    main()
