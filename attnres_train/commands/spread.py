"""Commands that use a run's model: with all of it in this process, as one of those that share it,
or by starting these."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch

from attnres_train.config.errors import ConfigError
from attnres_train.errors import UserError
from attnres_train.inference.decoding import CachedDecoder, Reader
from attnres_train.inference.grid import on_grid
from attnres_train.inference.joining import join_model
from attnres_train.inference.opening import Saved, choose, find_saved, open_model
from attnres_train.parallel.launched import launched_world_size
from attnres_train.supervise.launcher import launch
from attnres_train.supervise.preflight import device_problems
from attnres_train.supervise.signals import heard, raised
from attnres_train.supervise.worker import run_worker

THINKING = timedelta(days=7)
"""How long the other ranks wait for what comes from outside: the next prompt of a conversation, the
data of a task."""

Work = Callable[[Reader], None]
"""What is done with the model, on one rank."""


def run(
    args: argparse.Namespace,
    check: Callable[[], None],
    prepare: Callable[[Saved], Work],
    cpu_dtype: torch.dtype | None = None,
    patience: timedelta | None = None,
) -> int:
    """Open the model in ``args.run_folder`` over the processes that ``args.nproc`` and
    ``args.overrides`` ask for, on ``args.device``, and do the work that ``prepare`` has made of the
    checkpoint. ``check`` raises UserError for options that cannot be; ``cpu_dtype`` and
    ``patience`` are as for `join_model`. Returns the exit code."""
    world_size = launched_world_size()
    if world_size is not None and world_size > 1:
        with heard(with_agent=True, keeps_nothing=True):
            return run_worker(lambda: _share(args, check, prepare, cpu_dtype, patience))
    if args.nproc is not None and args.nproc < 1:
        raise UserError(f"--nproc is {args.nproc}: it is at least 1")
    check()
    saved = find_saved(args.run_folder)
    _, count = on_grid(saved.config, args.overrides, world_size or args.nproc)
    if count > 1:
        with raised():
            return _launch(args, count)
    work = prepare(saved)
    on_cpu = choose(args.device).type == "cpu"
    opened = open_model(saved.path, args.device, cpu_dtype if on_cpu else None)
    work(CachedDecoder.of(opened.chunk))
    return 0


def _launch(args: argparse.Namespace, count: int) -> int:
    """Start ``count`` processes on this machine that share the model."""
    _check_device(args.device, count)
    command = ["-m", "attnres_train", *args.words_given]
    with tempfile.TemporaryDirectory(prefix="attnres-train-") as scratch:  # failures are told there
        return launch(command, count, Path(scratch))


def _check_device(device: str, local_processes: int | None) -> None:
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"--device {device}: of several processes each has its own: it is cpu, cuda or auto"
        )
    if problems := list(device_problems(device, local_processes, "--device")):
        raise ConfigError(problems)


def _share(
    args: argparse.Namespace,
    check: Callable[[], None],
    prepare: Callable[[Saved], Work],
    cpu_dtype: torch.dtype | None,
    patience: timedelta | None,
) -> int:
    """Be one of the processes that share the model."""

    def checked(saved: Saved) -> Work:
        check()
        return prepare(saved)

    with join_model(
        args.run_folder,
        args.overrides,
        args.device,
        checked,
        check=lambda: _check_device(args.device, None),
        cpu_dtype=cpu_dtype,
        patience=patience,
    ) as joined:
        if joined is not None:
            work, reader = joined
            work(reader)
    return 0
