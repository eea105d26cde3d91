"""The process grid: who is in which pipeline, who averages with whom."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from typing import Any

import pytest
import torch
import torch.distributed as dist

from attnres_train.config.schema import RunConfig
from attnres_train.model.parameters import ParameterRule, constant
from attnres_train.parallel.meeting import meet
from attnres_train.parallel.ranks import choose_device, join_run
from tests.tiny import free_port, torchrun_environment

WHOLE = ParameterRule(constant(0))
SPLIT = ParameterRule(constant(0), split=0)
EXPERT = ParameterRule(constant(0), is_expert=True)


def config(stages: int, experts: int = 1, tensor: int = 1, context: int = 1) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"hidden_size": 8, "num_layers": 4, "vocab_size": 300},
            "train": {"train_iters": 1, "seq_length": 8, "global_batch_size": 4, "device": "cpu"},
            "parallel": {
                "pipeline_model_parallel_size": stages,
                "expert_model_parallel_size": experts,
                "tensor_model_parallel_size": tensor,
                "context_parallel_size": context,
            },
            "pipeline": {"timeout_seconds": 300},
        }
    )


def place(
    stages: int, experts: int, port: int, tensor: int = 1, context: int = 1
) -> dict[str, Any]:
    """Runs on every rank: join, and say where this process stands."""
    with (
        torchrun_environment(port),
        redirect_stderr(io.StringIO()) as warned,
        meet(300) as meeting,
        join_run(config(stages, experts, tensor, context), meeting) as ranks,
    ):
        assert ranks.control.size() == ranks.world_size
        found = {
            "rank": ranks.rank,
            "stage": ranks.pp_rank,
            "replica": ranks.dp_rank,
            "replicas": ranks.dp_size,
            "main": ranks.is_main,
            "pipelines": ranks.pipelines,
            "pipeline": dist.get_process_group_ranks(ranks.pipeline),
            "data": dist.get_process_group_ranks(ranks.data),
            "experts": dist.get_process_group_ranks(ranks.experts),
            "expert_data": dist.get_process_group_ranks(ranks.replicas(EXPERT)),
            "dense_data": dist.get_process_group_ranks(ranks.replicas(WHOLE)),
            "split_data": dist.get_process_group_ranks(ranks.replicas(SPLIT)),
            "tensor": dist.get_process_group_ranks(ranks.tensor),
            "context": dist.get_process_group_ranks(ranks.context),
            "timeouts": [
                group._get_backend(ranks.device).options._timeout.total_seconds()
                for group in (ranks.pipeline, ranks.data, ranks.experts, ranks.expert_data)
            ],
        }
    assert not dist.is_initialized()
    return found | {"warned": warned.getvalue()}


@pytest.mark.parametrize(("stages", "world_size"), [(1, 2), (2, 4), (4, 4)])
def test_the_grid(pool, stages, world_size):
    found = pool.run(place, world_size, stages, 1, free_port())
    replicas = world_size // stages
    for rank, here in enumerate(found):
        assert here["rank"] == rank
        assert here["main"] == (rank == 0)
        assert here["replicas"] == replicas
        assert here["pipeline"][here["stage"]] == rank
        assert here["data"][here["replica"]] == rank
        assert len(here["pipeline"]) == stages and len(here["data"]) == replicas
        assert tuple(here["pipeline"]) in here["pipelines"]
        assert here["pipelines"] == found[0]["pipelines"]
        # Replicas of a stage hold the same layers.
        assert {found[peer]["stage"] for peer in here["data"]} == {here["stage"]}
    assert sorted(r for pipeline in found[0]["pipelines"] for r in pipeline) == list(
        range(world_size)
    )
    assert {(here["stage"], here["replica"]) for here in found} == {
        (stage, replica) for stage in range(stages) for replica in range(replicas)
    }


@pytest.mark.parametrize(
    ("stages", "world_size", "shared", "copies"),
    [(1, 2, [[0, 1]], [[0], [1]]), (2, 8, [[0, 1], [2, 3]], [[0, 2], [1, 3]])],
)
def test_experts_are_shared_by_neighbours(pool, stages, world_size, shared, copies):
    found = pool.run(place, world_size, stages, 2, free_port())
    replicas = world_size // stages
    for rank, here in enumerate(found):
        first = rank // replicas * replicas  # the ranks of a stage are adjacent
        assert [r - first for r in here["experts"]] in shared and rank in here["experts"]
        assert [r - first for r in here["expert_data"]] in copies and rank in here["expert_data"]
        assert here["dense_data"] == here["data"] == list(range(first, first + replicas))
        assert here["timeouts"] == [300] * 4


def test_tensor_and_context_ranks_of_a_stage(pool):
    """Two stages of 2 (tensor) x 2 (context); four ranks at a time share the experts."""
    found = pool.run(place, 8, 2, 4, free_port(), 2, 2)
    for rank, here in enumerate(found):
        first = rank // 4 * 4  # of the stage
        tensor = [first + (rank - first) // 2 * 2 + i for i in range(2)]
        context = [first + rank % 2 + 2 * i for i in range(2)]
        assert (here["tensor"], here["context"], here["data"]) == (tensor, context, [rank])
        assert here["split_data"] == context  # have the same shard, and other tokens
        assert here["dense_data"] == here["experts"] == [first + i for i in range(4)]
        assert here["expert_data"] == [rank]
        assert here["pipeline"] == [rank % 4, rank % 4 + 4]


def join_twice_alone() -> list[int]:
    """Without a launcher, and again in the same process with other groups."""
    dist.destroy_process_group()
    sizes = []
    for _ in range(2):
        with meet(300) as meeting, join_run(config(1), meeting) as ranks:
            sizes.append(ranks.world_size)
    return sizes


def test_a_process_may_be_alone(pool):
    assert pool.run(join_twice_alone, 1) == [[1, 1]]


def test_devices(monkeypatch):
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device("cuda") == torch.device("cuda", 3)
    auto = torch.device("cuda", 3) if torch.cuda.is_available() else torch.device("cpu")
    assert choose_device("auto") == auto
