"""Two machines, each in a network namespace: disks that are not shared, a link that is cut, a host
that freezes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import SECONDS, Hosts, two_hosts, why_not
from tests.tiny import column, grid, write_config

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]
STEPS = 40
# Also of connections when the run starts: on a busy machine one rank is a good while behind.
TIMEOUT = "pipeline.timeout_seconds=60"


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with two_hosts() as joined:
        yield joined


def words(folder: Path, *overrides: str) -> list[str]:
    """A run of two stages whose steps take 0.3 s until `folder`/slow is gone."""
    slow = folder / "slow"
    slow.touch()
    pace = f"{{kind: 'tests.cluster.pace:Pace', options: {{file: {slow}, late: 0.3}}}}"
    steps = [f"train.train_iters={STEPS}", "train.eval_interval=0", "checkpoint.save_interval=2"]
    return [*grid(2, 1), *steps, f"log.observers=[{pace}]", *overrides]


def wait_for_steps(hosts: Hosts, run: Path, count: int) -> None:
    deadline = time.monotonic() + SECONDS
    while not (run / "metrics.jsonl").exists() or len(column(run, "step")) < count:
        ended = [host for host in (0, 1) if hosts.processes[host].poll() is not None]
        assert not ended, hosts.end(*ended)
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_disks_that_are_not_shared_are_refused_by_the_name_of_the_machine(hosts, tmp_path):
    disks = tmp_path / "disk", tmp_path / "other"
    for disk in disks:
        disk.mkdir()
    config = write_config(tmp_path)
    hosts.train(config, *words(tmp_path, f"run.dir={disks[0]}/runs"), disks=disks)
    for code, told in hosts.end(0, 1):
        assert code == 2, told
        assert f"run.dir: {disks[0]}/runs/tiny is not the folder that rank 0 sees" in told
        assert "(on host-b: rank 1)" in told
    assert not list((disks[0] / "runs" / "tiny").glob("checkpoints"))
    assert not list(disks[1].iterdir())


def test_caches_that_are_not_shared_are_made_on_both(hosts, tmp_path):
    disks = tmp_path / "disk", tmp_path / "other"
    for disk in disks:
        disk.mkdir()
    overrides = words(tmp_path, f"data.cache_dir={disks[0]}/cache", "train.train_iters=2")
    hosts.train(write_config(tmp_path), *overrides, disks=disks)
    assert [code for code, _ in hosts.end(0, 1)] == [0, 0]
    assert {path.name for path in (disks[0] / "cache").iterdir()} == {
        path.name for path in (disks[1] / "cache").iterdir()
    }


def test_a_link_that_is_cut_for_a_moment_is_waited_for(hosts, tmp_path):
    run = tmp_path / "runs" / "tiny"
    hosts.train(write_config(tmp_path), *words(tmp_path))
    wait_for_steps(hosts, run, 3)
    hosts.cut()
    time.sleep(3)
    hosts.restore()
    (tmp_path / "slow").unlink()
    for code, told in hosts.end(0, 1):
        assert code == 0, told
    assert column(run, "step") == list(range(1, STEPS + 1))


def test_a_link_that_stays_cut_is_told_after_the_timeout(hosts, tmp_path):
    run = tmp_path / "runs" / "tiny"
    hosts.train(write_config(tmp_path), *words(tmp_path, TIMEOUT))
    wait_for_steps(hosts, run, 3)
    hosts.cut()
    for rank, (code, told) in enumerate(hosts.end(0, 1)):
        assert code == 1, told
        assert "waited for each other" in told or f"rank {1 - rank} stopped" in told


def test_a_host_that_freezes_is_named_after_the_timeout(hosts, tmp_path):
    run = tmp_path / "runs" / "tiny"
    hosts.train(write_config(tmp_path), *words(tmp_path, TIMEOUT))
    wait_for_steps(hosts, run, 3)
    hosts.freeze(1)
    ((code, told),) = hosts.end(0)
    assert code == 1, told
    assert "rank 1 stopped the run: rank 0 waited since" in told or "rank 1 did not join" in told
