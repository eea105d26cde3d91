"""One tiny run, whole: corpus, configuration, and ways to train it and to look at what it left."""

from __future__ import annotations

import io
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from attnres_train.checkpoint import store
from attnres_train.checkpoint.folders import step_name
from attnres_train.checkpoint.manifest import read_manifest
from attnres_train.config import check_config, load_config
from attnres_train.config.schema import RunConfig
from attnres_train.observe.observer import Record
from attnres_train.observe.sinks import read_records
from tests.data.tiny import write_text

STEPS = 6
SAMPLES = 4
"""Of a step."""
TOKENS = 32 * SAMPLES
CONFIG = {
    "run": {"name": "tiny"},
    "model": {
        "hidden_size": 32,
        "num_layers": 4,
        "vocab_size": 300,
        "intermediate_size": 48,
        "residual": {"kind": "block", "block_size": 3},
        "kda": {"num_heads": 2, "head_dim": 8, "chunk_size": 16},
        "mla": {
            "num_heads": 2,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 8,
        },
        "moe": {"num_experts": 4, "num_experts_per_token": 2, "intermediate_size": 16},
    },
    "train": {
        "train_iters": STEPS,
        "seq_length": 32,
        "micro_batch_size": 2,
        "global_batch_size": SAMPLES,
        "eval_interval": 3,
        "eval_iters": 2,
        "device": "cpu",
    },
    "optimizer": {"lr": 0.01},
    "lr_schedule": {"kind": "constant"},
    "data": {"tokenizer": {"kind": "bpe", "vocab_size": 300}, "split": [0.8, 0.2]},
    "checkpoint": {"save_interval": 3},
    "log": {"interval": 2, "plot": False},
}


def write_config(folder: Path, **sections: Any) -> Path:
    """A configuration file and its corpus in ``folder``, with absolute paths; ``sections`` replace
    whole sections."""
    corpus = {"kind": "text", "path": str(write_text(folder / "corpus", 16, 40))}
    content = CONFIG | {
        "run": {"name": "tiny", "dir": str(folder / "runs")},
        "data": {**CONFIG["data"], "corpus": [corpus], "cache_dir": str(folder / "cache")},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content | sections), encoding="utf-8")
    return path


class TinyRuns:
    """Trains the tiny configuration on processes of a pool, as torchrun would start them."""

    def __init__(self, folder: Path, pool: Any) -> None:
        self.folder, self.pool = folder, pool
        self.path = write_config(folder)
        self._done: dict[tuple, str] = {}

    def config(self, *overrides: str) -> RunConfig:
        return load_config(self.path, overrides)

    def train(self, name: str, *overrides: str, ranks: int = 1) -> Path:
        """Run or resume run ``name``, once per session for the same call. Returns its folder."""
        key = (name, overrides, ranks)
        if key not in self._done:
            arguments = [str(self.path), f"run.name={name}", *overrides]
            outputs = self.pool.run(train_rank, ranks, arguments, free_port())
            self._done[key] = outputs[0]
        return self.folder / "runs" / name

    def screen(self, name: str, *overrides: str, ranks: int = 1) -> str:
        """What rank 0 of the run prints."""
        self.train(name, *overrides, ranks=ranks)
        return self._done[name, overrides, ranks]


def train_rank(arguments: list[str], port: int) -> str:
    """Train as one rank of a pool; returns what it prints."""
    from attnres_train.train import train

    with torchrun_environment(port) as world_size, redirect_stdout(io.StringIO()) as screen:
        config = load_config(arguments[0], arguments[1:])
        check_config(config, world_size)
        train(config)
    return screen.getvalue()


def train_rank_told(arguments: list[str], port: int, run: Path) -> str:
    """As `train_rank`; the last rank is told to stop (SIGUSR1) once two steps are logged."""

    def tell() -> None:
        while len(records(run)) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)

    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        threading.Thread(target=tell, daemon=True).start()
    return train_rank(arguments, port)


@contextmanager
def torchrun_environment(port: int) -> Iterator[int]:
    """Give up the pool's process group for what torchrun would have set; yields WORLD_SIZE."""
    dist = torch.distributed
    rank, world_size = dist.get_rank(), dist.get_world_size()
    dist.barrier()  # every rank has opened its connections
    dist.destroy_process_group()
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    environment = {name: str(value) for name, value in names.items()}
    os.environ |= environment | {"MASTER_ADDR": "127.0.0.1"}
    try:
        yield world_size
    finally:
        for name in (*names, "MASTER_ADDR"):
            del os.environ[name]


def free_port() -> int:
    """A port for a rendezvous, below those that the kernel hands out (from 32768 on): gloo's own
    sockets, of whatever else runs here, cannot take it before it is listened on."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as server, suppress(OSError):
            server.bind(("127.0.0.1", port))
            return port


def grid(stages: int, virtual: int) -> list[str]:
    """Overrides for P stages x V virtual ones."""
    parallel = "parallel.{}pipeline_model_parallel_size={}"
    return [parallel.format("", stages), parallel.format("virtual_", virtual)]


def records(run: Path) -> list[Record]:
    return read_records(run / "metrics.jsonl")


def column(run: Path, key: str) -> list[Any]:
    """``key`` of every step that has it."""
    return [record[key] for record in records(run) if key in record]


def saved_tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint."""
    path = run / "checkpoints" / step_name(step)
    tensors = {name: saved.empty() for name, saved in read_manifest(path).tensors.items()}
    store.load(path, tensors)
    return tensors


def whole(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below ``folder``, content and time."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "attnres_train", *map(str, arguments)]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, as of a user who has started no launcher."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in launcher}
    return inherited | {"OMP_NUM_THREADS": "1"} | changes


def run_cli(*arguments: str | Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own; ``changes`` go into its environment."""
    return subprocess.run(
        command(*arguments),
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
