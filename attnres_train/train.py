"""One worker of a run: builds every part for this rank from the config and starts the loop."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from attnres_train.checkpoint import folders, rng, store
from attnres_train.checkpoint.names import training_state
from attnres_train.config import describe, save_config
from attnres_train.config.schema import RunConfig
from attnres_train.data.loader import open_data
from attnres_train.data.prepare import prepare, read_prepared
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.flops import training_flops_per_token
from attnres_train.model.init import init_weights
from attnres_train.model.naming import released_tensors
from attnres_train.model.parameters import parameter_rules
from attnres_train.observe.console import Console
from attnres_train.observe.hardware import environment, peak_flops
from attnres_train.observe.plot import LossPlot
from attnres_train.observe.sinks import JsonLines, Observer, Record, TensorBoard, Wandb
from attnres_train.optim.build import build_optimizer
from attnres_train.optim.hybrid import HybridOptimizer
from attnres_train.parallel.ranks import Ranks, join_run
from attnres_train.pipeline.plan.messages import channels
from attnres_train.pipeline.plan.schedule import SCHEDULES, forward_only
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.pipeline.run.engine import Engine
from attnres_train.pipeline.run.transport import P2PTransport
from attnres_train.planning.build import build_plan, chunk_layers
from attnres_train.planning.facts import facts
from attnres_train.supervise import failures
from attnres_train.supervise.run_lock import run_lock
from attnres_train.supervise.signals import catch_stop_signals
from attnres_train.trainer import Parts, Progress, Trainer

PARAMETER_DTYPE = {
    "fp32": torch.float32,
    "bf16": torch.float32,
    "bf16_params": torch.bfloat16,
}
STREAM_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16_params": torch.bfloat16}


def train(config: RunConfig) -> int:
    """Train ``config`` as one of the run's processes (torchrun's environment). Returns 0, also when
    a signal stopped the run: it is saved, and the same command resumes it."""
    folder = Path(config.run.dir) / config.run.name
    stop_requested = catch_stop_signals(folder)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        # One process per machine; the others wait for it in join_run. Nothing to do where the
        # local launcher or `attnres-train data` has prepared already.
        prepare(config, progress=False)
    with (
        owned(folder),
        join_run(config) as ranks,
        failures.recorded(folder, ranks.rank, ranks.own_pipeline, ranks.world_size),
    ):
        parts = build_parts(config, ranks)
        if ranks.is_main:
            more = facts(config, ranks.device)
            print(describe(config, chunk_layers(config), ranks.world_size, more), flush=True)
        progress = Trainer(config, ranks, parts, stop_requested).fit()
        if ranks.is_main and progress.step < config.train.train_iters:
            print(f"stopped behind step {progress.step}, saved; the same command resumes")
    return 0


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Rank 0 takes the run folder for this run alone, and clears it of earlier failures."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    with run_lock(folder):
        failures.clear(folder)
        yield


def build_parts(config: RunConfig, ranks: Ranks) -> Parts:
    """Data, chunks, engine, optimizer, checkpoints and observers of this rank."""
    plan = build_plan(config)
    chunks = build_chunks(config, plan, ranks)
    named = {name: p for chunk in chunks.values() for name, p in chunk.named_parameters()}
    rules = {n: r for chunk in chunks.values() for n, r in parameter_rules(chunk).items()}
    optimizer = build_optimizer(named.items(), rules, config.optimizer, ranks.device)
    engine = Engine(
        chunks,
        plan,
        ranks.pp_rank,
        P2PTransport(channels(plan), ranks.pipelines, ranks.timeout, ranks.device),
        hidden_size=config.model.stream_size,
        stream_dtype=STREAM_DTYPE[config.train.precision],
        device=ranks.device,
        debug=config.pipeline.debug,
        schedule=SCHEDULES[config.pipeline.schedule],
    )
    train = config.train
    num_micro_batches = train.global_batch_size // (train.micro_batch_size * ranks.dp_size)
    for schedule in (engine.schedule, forward_only):
        engine.program(schedule, num_micro_batches)  # validated now, before step 1
    folder = Path(config.run.dir) / config.run.name
    prepared = read_prepared(config)
    info = {
        "num_parameters": ranks.sum_over_pipeline(sum(p.numel() for p in named.values())),
        "num_tokens": prepared.num_tokens,
        "unigram_entropy": prepared.unigram_entropy_nats,
    }
    return Parts(
        chunks=list(chunks.values()),
        engine=engine,
        optimizer=optimizer,
        data=open_data(config),
        checkpoints=Checkpoints(config, ranks, folder, list(chunks.values()), optimizer),
        observers=build_observers(config, ranks, folder, info) if ranks.is_main else [],
        flops_per_token=partial(training_flops_per_token, config.model),
        peak_flops=peak_flops(ranks.device),
    )


def build_chunks(config: RunConfig, plan: TransportPlan, ranks: Ranks) -> dict[int, ModelChunk]:
    """This rank's chunks by index, with initial weights that do not depend on the layout."""
    chunks = {}
    for index in plan.layout.chunks_of(ranks.pp_rank):
        layers = plan.layout.layers(index)
        chunk = ModelChunk(
            config.model,
            layers.start,
            layers.stop,
            recompute=config.train.recompute,
            stream_dtype=STREAM_DTYPE[config.train.precision],
            autocast_dtype=torch.bfloat16 if config.train.precision == "bf16" else None,
            device=ranks.device,
            dtype=PARAMETER_DTYPE[config.train.precision],
        )
        init_weights(chunk, config.run.seed)
        chunks[index] = chunk
    return chunks


def build_observers(config: RunConfig, ranks: Ranks, folder: Path, info: dict) -> list[Observer]:
    """The main process's observers."""
    about = {"info": info, "environment": environment(ranks.device, ranks.world_size)}
    observers: list[Observer] = [
        RunFacts(config, folder, about),
        JsonLines(folder / "metrics.jsonl"),
        Console(config),
    ]
    if config.log.tensorboard:
        observers.append(TensorBoard(folder / "tensorboard"))
    if config.log.wandb.enabled:
        observers.append(Wandb(config, folder))
    if config.log.plot:
        observers.append(LossPlot(folder, info["unigram_entropy"]))
    return observers


class RunFacts:
    """Writes config.yaml and ``about`` (file name -> content) into the run folder; not before the
    run has resumed, so that an attempt that cannot leaves those of the run it wanted to resume."""

    def __init__(self, config: RunConfig, folder: Path, about: dict[str, dict]) -> None:
        self.config, self.folder, self.about = config, folder, about

    def on_start(self, step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        save_config(self.config, self.folder / "config.yaml")
        for name, content in self.about.items():
            text = json.dumps(content, indent=2)
            (self.folder / f"{name}.json").write_text(text, encoding="utf-8")

    def on_step(self, record: Record) -> None:
        pass

    def on_end(self) -> None:
        pass


class Checkpoints:
    """Saves and resumes this run's state, every tensor under its layout-free name."""

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        folder: Path,
        chunks: list[ModelChunk],
        optimizer: HybridOptimizer,
    ) -> None:
        self.config, self.ranks = config, ranks
        self.folder = folder / "checkpoints"
        named = [item for chunk in chunks for item in chunk.state_dict(keep_vars=True).items()]
        self.tensors = training_state(
            [(name, tensor.detach()) for name, tensor in named], optimizer, released_tensors
        )
        self.loaded_from: Path | None = None

    def resume(self) -> Progress:
        """Load what `checkpoint.resume` asks for, into chunks and optimizer, in place."""
        path = folders.resolve_resume(self.config.checkpoint.resume, self.folder)
        if path is None:
            return Progress()
        restored = store.load(path, self.tensors, group=self.ranks.control)
        if restored.rng is not None:
            rng.set_rng_state(restored.rng)
        if self.ranks.is_main:
            print(f"resumed from {path}", flush=True)
        self.loaded_from = path
        return Progress(**restored.extras["progress"])

    def save(self, progress: Progress) -> None:
        """Publish a checkpoint of all ranks behind the current step."""
        path = store.save(
            self.folder,
            progress.step,
            self.tensors,
            {"progress": vars(progress), "config": self.config.model_dump(mode="json")},
            keep_last=self.config.checkpoint.keep_last,
            loaded_from=self.loaded_from,
            group=self.ranks.control,
        )
        if self.ranks.is_main:
            print(f"saved {path}", flush=True)
