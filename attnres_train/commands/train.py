"""`attnres-train train`: be one process of a run, or start its local processes."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from attnres_train.config import check_config, load_config
from attnres_train.config.schema import RunConfig
from attnres_train.loading import without_collection
from attnres_train.observe.curves import check_sinks
from attnres_train.parallel.launched import launched_world_size
from attnres_train.supervise import failures
from attnres_train.supervise.launcher import default_world_size, launch
from attnres_train.supervise.preflight import check_machine
from attnres_train.supervise.run_lock import run_lock
from attnres_train.supervise.signals import heard, raised
from attnres_train.supervise.worker import run_worker

if TYPE_CHECKING:
    from attnres_train.runs.preparation import Preparation


def run(args: argparse.Namespace) -> int:
    world_size = launched_world_size()
    if world_size is None:
        with raised():
            return _launch(args)
    with heard():  # at once: to import torch takes seconds
        return run_worker(lambda: _work(args, world_size))


def _work(args: argparse.Namespace, world_size: int) -> int:
    """Be one of the ``world_size`` processes that a launcher has started."""
    config = load_config(args.config, args.overrides)
    check_config(config, world_size)
    check_machine(config)
    check_sinks(config.log)
    # Imported here: a config that cannot run is told before torch is loaded.
    with without_collection():
        from attnres_train.train import train

    return train(config)


def _launch(args: argparse.Namespace) -> int:
    """Start the processes of the run on this machine, once nothing speaks against it."""
    config = load_config(args.config, args.overrides)
    check_config(config, args.nproc)
    world_size = args.nproc or default_world_size(config)
    check_config(config, world_size)
    check_machine(config, world_size)
    check_sinks(config.log)
    made = prepare_once(config)
    if isinstance(made, str):
        print(made)
        return 0
    from attnres_train.parallel.meeting import told_beforehand
    from attnres_train.runs.preparation import hand_over
    from attnres_train.runs.start import HANDED_OVER

    with tempfile.TemporaryDirectory(prefix="attnres-train-") as scratch:
        prepared = Path(scratch, "prepared.json")
        hand_over(made, prepared)
        command = ["-m", "attnres_train", "train", args.config, *args.overrides]
        told = told_beforehand(HANDED_OVER, str(prepared))
        return launch(command, world_size, Path(config.run.dir) / config.run.name, told)


def prepare_once(config: RunConfig) -> list[Preparation] | str:
    """What is done once, before any worker starts: the checkpoint to resume from, data, the run
    folder, in which no other run may be at work. Returns the data, for the workers, or what to tell
    where there is nothing to train: nothing is written then.

    Raises UserError where one of them is not to be had, or the checkpoint is of another run.
    """
    from attnres_train.runs import identity
    from attnres_train.runs.preparation import prepare_stages
    from attnres_train.runs.stages import problems_named
    from attnres_train.runs.standing import nothing_left, standing

    if done := nothing_left(config):
        return done
    made = prepare_stages(config)
    folder = Path(config.run.dir) / config.run.name
    if found := standing(config):
        record = identity.data_record(found.config, made[0].prepared)
        with problems_named(config, found.stage):
            goes_on = not found.is_new
            identity.compare(found.config, found.path, found.extras, record, goes_on=goes_on)
    with run_lock(folder):  # rank 0 will hold it
        failures.clear(folder)
    return made
