"""Which cores or GPUs a run of a study has."""

from __future__ import annotations

import os

import pytest

from attnres_train.config import load_config
from attnres_train.errors import UserError
from attnres_train.study.slots import _on_cores, _on_gpus, make_slots
from tests.tiny import write_config


def visible(gpus: int, most: int, jobs: int | None) -> list[str]:
    slots = _on_gpus([str(number) for number in range(gpus)], most, jobs)
    return [environment["CUDA_VISIBLE_DEVICES"] for environment in slots.environments]


def test_each_run_has_gpus_of_its_own():
    assert visible(8, 4, None) == ["0,1,2,3", "4,5,6,7"]
    assert visible(3, 2, None) == ["0,1,2"]
    assert visible(1, 1, None) == ["0"]
    assert visible(8, 1, 2) == ["0,1,2,3", "4,5,6,7"]


def test_more_jobs_than_gpus_share_them():
    assert visible(1, 1, 3) == ["0", "0", "0"]
    assert visible(2, 1, 4) == ["0", "1", "0", "1"]


def test_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    slots = _on_cores(1, None)
    assert len(slots.environments) == cores
    assert slots.environments[0] == {"OMP_NUM_THREADS": "1"}
    assert _on_cores(1, 1).environments == [{"OMP_NUM_THREADS": str(cores)}]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert _on_cores(1, 1).environments == [{}]  # the user's own stays


def test_cpu_runs_take_no_gpu(tmp_path):
    config = load_config(write_config(tmp_path))
    assert "cores" in make_slots([config], 2).told
    with pytest.raises(UserError, match="--jobs is 0"):
        make_slots([config], 0)
