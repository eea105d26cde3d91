"""A run under a real SLURM of two nodes, by the repository's own batch script: time limit, requeue,
`scancel`, a node that dies, a task that is killed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attnres_train.checkpoint.folders import find_latest
from attnres_train.checkpoint.manifest import read_manifest
from tests.cluster.slurm import Cluster, slurm, why_not
from tests.tiny import column, grid, write_config

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
ROOT = Path(__file__).parents[2]
SBATCH = ROOT / "launch" / "slurm.sbatch"
STEPS = 60


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with slurm(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture(autouse=True)
def nothing_left(cluster) -> Iterator[None]:
    """A test that fails leaves no job, which would be requeued beside the next one's."""
    yield
    cluster.clear()


class Job:
    """A run of two tasks, one on each node. Its steps take long until `hurry`."""

    def __init__(self, cluster: Cluster, folder: Path, *options: str) -> None:
        self.cluster, self.folder = cluster, folder
        self.run = folder / "runs" / "tiny"
        self.log = folder / "job.log"
        self.slow = folder / "slow"
        self.slow.touch()
        config = write_config(folder)
        pace = f"{{kind: 'tests.cluster.pace:Pace', options: {{file: {self.slow}}}}}"
        words = [
            "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0",
            "--cpus-per-task=1", f"--output={self.log}", *options, str(SBATCH),
            str(config), *grid(2, 1), f"train.train_iters={STEPS}", "train.eval_interval=0",
            "checkpoint.save_interval=2", f"log.observers=[{pace}]",
        ]  # fmt: skip
        path = f"{Path(sys.executable).parent}:{cluster.environment['PATH']}"
        self.number = cluster.run(*words, PATH=path, PYTHONPATH=str(ROOT)).strip()

    def wait_for_steps(self, count: int) -> None:
        self.cluster.wait_for(
            lambda: len(self.steps()) >= count, f"no {count} steps: {self.told()}"
        )

    def steps(self) -> list[int]:
        return column(self.run, "step") if (self.run / "metrics.jsonl").exists() else []

    def saved(self) -> int:
        path = find_latest(self.run / "checkpoints")
        return read_manifest(path).step if path else 0

    def told(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def hurry(self) -> None:
        self.slow.unlink()

    def goes_on(self) -> None:
        """Wait for the job to be back in the queue.

        SLURM starts it two minutes later, and that is not cut short: a node refuses a credential
        made in the second in which it revoked the first attempt's, and a node that was away is told
        a minute later to end a step that has the number of the second attempt's.
        """
        self.cluster.wait_for(
            lambda: self.cluster.job(self.number)["Restarts"] != "0", f"no restart: {self.told()}"
        )

    def ends(self) -> None:
        """It goes on from where it was saved, to the end."""
        saved = self.saved()
        self.hurry()
        job = self.cluster.wait_for_state(self.number, "COMPLETED", "FAILED", "CANCELLED")
        assert job["JobState"] == "COMPLETED", (job, self.told(), self.cluster.logs())
        assert self.steps() == list(range(1, STEPS + 1))
        assert self.saved() == STEPS
        if saved:
            assert f"step_{saved:08d}\n" in self.told().split("resumed from ")[-1]

    def pids(self, node: str) -> list[int]:
        """The processes that SLURM has started on a node for this job, tasks first."""
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                told = path.read_bytes().split(b"\0")
            except OSError:
                continue
            wanted = {
                f"SLURM_CONF={self.cluster.environment['SLURM_CONF']}",
                f"SLURM_JOB_ID={self.number}",
                f"SLURMD_NODENAME={node}",
            }
            if {word.encode() for word in wanted} <= set(told):
                found.append(int(path.parent.name))
        return found


def test_the_time_limit_saves_and_requeues(cluster, tmp_path):
    # SLURM counts in minutes, and may tell one early; a busy machine takes two to the first step.
    # Fifty-seven slow steps take longer than the limit.
    job = Job(cluster, tmp_path, "--time=4", "--signal=B:USR1@60")
    job.wait_for_steps(1)
    job.goes_on()
    assert job.saved() == len(job.steps()) > 0, "the last step is saved"
    job.ends()
    assert "User defined signal" not in job.told()


def test_a_signal_before_python_can_take_it(cluster, tmp_path):
    job = Job(cluster, tmp_path)
    cluster.wait_for(lambda: bool(job.pids("n2")), "no task")
    cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    job.goes_on()
    job.ends()
    assert "User defined signal" not in job.told()


def test_scancel_saves_and_ends_the_job(cluster, tmp_path):
    job = Job(cluster, tmp_path)
    job.wait_for_steps(3)
    cluster.run("scancel", job.number)
    assert cluster.wait_for_state(job.number, "CANCELLED", "PENDING")["JobState"] == "CANCELLED"
    cluster.wait_for(lambda: not job.pids("n1") + job.pids("n2"), "tasks are left")
    assert job.saved() == len(job.steps()) >= 3, job.told()
    assert cluster.job(job.number)["Restarts"] == "0"


def test_scancel_with_a_signal_saves_and_completes_the_job(cluster, tmp_path):
    job = Job(cluster, tmp_path)
    job.wait_for_steps(3)
    cluster.run("scancel", "--signal=USR1", job.number)
    assert cluster.wait_for_state(job.number, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    assert job.saved() == len(job.steps()) < STEPS
    assert cluster.job(job.number)["Restarts"] == "0"


def test_a_task_that_is_killed_ends_the_job_by_name(cluster, tmp_path):
    job = Job(cluster, tmp_path)
    job.wait_for_steps(3)
    task = next(pid for pid in job.pids("n2") if is_task(pid))
    os.kill(task, signal.SIGKILL)
    assert cluster.wait_for_state(job.number, "FAILED", "PENDING")["JobState"] == "FAILED"
    assert "error: n2: task 1: Killed" in job.told()
    assert job.saved() >= 2


def test_a_node_that_dies_sends_the_job_back_into_the_queue(cluster, tmp_path):
    job = Job(cluster, tmp_path)
    job.wait_for_steps(3)
    cluster.stop("n2")
    for pid in job.pids("n2"):
        os.kill(pid, signal.SIGKILL)
    try:
        job.cluster.wait_for(
            lambda: (
                cluster.job(job.number)["Restarts"] != "0"
                or cluster.job(job.number)["JobState"] == "FAILED"
            ),
            job.told(),
        )
    finally:
        cluster.start_node("n2")
    job.goes_on()
    job.ends()


def is_task(pid: int) -> bool:
    return b"attnres_train" in Path(f"/proc/{pid}/cmdline").read_bytes()
