"""Every process group of a run has the run's timeout: one for steps, one for checkpoints."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from unittest import mock

import pytest
import torch
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _world

from attnres_train.parallel import ranks
from attnres_train.parallel.ranks import Ranks, group_timeout
from attnres_train.runs.progress import Progress
from attnres_train.supervise import watch
from attnres_train.training.trainer import Trainer
from tests.tiny import column, environment, free_port, grid, run_cli, train_rank, write_config

STEP, SAVE, WATCHDOG = 41, 97, 1000
# A group that is added to `Ranks` is to be placed here: which of the two waits is it for?
PLACES = {
    "pipeline": STEP + WATCHDOG,
    "tensor": STEP + WATCHDOG,
    "context": STEP + WATCHDOG,
    "data": STEP + WATCHDOG,
    "shards": STEP + WATCHDOG,
    "stage": STEP + WATCHDOG,
    "experts": STEP + WATCHDOG,
    "expert_data": STEP + WATCHDOG,
    "control": STEP,
}


def seconds_of(group: ProcessGroup) -> float:
    backend = group._get_backend(torch.device("cpu"))
    return backend.options._timeout.total_seconds()


def timeouts(arguments: list[str], port: int) -> tuple[dict[str, float], float, list[float]]:
    """Of the groups in `Ranks` by name, of the checkpoints', and of all others. The backend of
    the device counts as one with a watchdog."""
    found = []

    def look_instead(trainer: Trainer) -> Progress:
        place, parts = trainer.ranks, trainer.parts
        own = {field.name: getattr(place, field.name) for field in dataclasses.fields(Ranks)}
        named = {n: seconds_of(g) for n, g in own.items() if isinstance(g, ProcessGroup)}
        known = {*map(id, own.values()), id(parts.checkpoints.group)}
        rest = [seconds_of(group) for group in _world.pg_map if id(group) not in known]
        found.append((named, seconds_of(parts.checkpoints.group), rest))
        return Progress(step=trainer.config.train.train_iters)

    def watched(backend: str, limit: timedelta) -> timedelta:
        return limit + timedelta(seconds=WATCHDOG)

    with (
        mock.patch.object(Trainer, "fit", look_instead),
        mock.patch.object(ranks, "group_timeout", watched),
    ):
        train_rank(arguments, port)
    return found[0]


def test_every_group_has_the_timeout_of_its_kind(tiny, pool):
    limits = [f"pipeline.timeout_seconds={STEP}", f"checkpoint.timeout_seconds={SAVE}"]
    words = [str(tiny.path), "run.name=timeouts", *grid(2, 2), *limits]
    for named, of_checkpoints, rest in pool.run(timeouts, 4, words, free_port()):
        assert named == PLACES
        assert of_checkpoints == SAVE
        # Besides: the group of all processes, and one for each channel of the pipelines.
        assert len(rest) > 2
        assert set(rest) == {STEP + WATCHDOG}


def test_the_watchdog_of_nccl_comes_after_our_own_watch():
    limit = timedelta(seconds=8)
    assert group_timeout("gloo", limit) == limit
    # Noticed, told, and left alone for a while: all of it before the process is ended.
    ours = watch.MARGIN_SECONDS + watch.POLL_SECONDS + watch.LEAVE_SECONDS
    later = (group_timeout("nccl", limit) - limit).total_seconds()
    assert later >= 3 * ours


@pytest.mark.parametrize("group", ["data"])
@pytest.mark.nightly
def test_a_hang_in_the_groups_operations_is_named(tmp_path, group):
    """Replicas wait in an all-reduce for one that sleeps."""
    config, run = write_config(tmp_path), tmp_path / "runs" / "tiny"
    sleeper = "{kind: tests.own_observers:Sleeper, options: {rank: 1, step: 3}}"
    words = ["--nproc", "2", f"log.observers=[{sleeper}]", "pipeline.timeout_seconds=8"]
    done = run_cli("train", config, *words, **environment())
    assert done.returncode == 1
    assert "rank 1 did not join an operation of all ranks" in done.stderr
    assert "in on_step_begin\n    time.sleep" in done.stderr
    assert "in on_step_begin" in (run / "failures" / "stacks_0001.txt").read_text()
    assert column(run, "step") == [1, 2]
