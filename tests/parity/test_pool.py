from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from attnres_train.pipeline.run.waits import PeerError, Wait
from tests.parity.pool import MOST_THREADS, RankFailedError


def sum_of_ranks(offset: int) -> tuple[int, int]:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return os.getpid(), total.item()


def fail_on_the_last_rank() -> None:
    if dist.get_rank() == 0:
        raise PeerError(0, Wait("receive", "block 0", "F", "F", 1, 8, 0.0))
    if dist.get_rank() == 2:
        raise ValueError("the cause")
    dist.barrier()


def hang_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def test_processes_are_used_again(pool):
    first, second = pool.run(sum_of_ranks, 3, 0), pool.run(sum_of_ranks, 2, 10)
    assert [total for _, total in first] == [3, 3, 3]
    assert [total for _, total in second] == [21, 21]
    assert {pid for pid, _ in second} < {pid for pid, _ in first}


def test_the_cause_is_raised_rather_than_its_echo(pool):
    with pytest.raises(RankFailedError, match=r"(?s)rank 2 of 3:.*fail_on_the_last.*the cause"):
        pool.run(fail_on_the_last_rank, 3)
    assert pool.run(sum_of_ranks, 3, 0)[0][1] == 3


@pytest.mark.nightly
def test_a_rank_that_hangs_is_named_and_replaced(pool):
    pool.run(sum_of_ranks, 2, 0)  # the processes are there: what follows is the hang alone
    with pytest.raises(RankFailedError, match=r"ranks .*1\] of 2 took more than 4 s"):
        pool.run(hang_on_rank_1, 2, timeout=4)
    assert pool.run(sum_of_ranks, 2, 0)[0][1] == 1


def test_a_rank_that_dies_is_named(pool):
    with pytest.raises(RankFailedError, match=r"rank 1 of 2:\nthe process died"):
        pool.run(die_on_rank_1, 2)


def leave_threads() -> int:
    for _ in range(MOST_THREADS + 1):
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    return os.getpid()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux does")
def test_a_process_that_is_full_of_threads_is_replaced(pool):
    (before,) = pool.run(leave_threads, 1)
    assert pool.run(sum_of_ranks, 1, 0)[0][0] != before
