"""Replicas begin with the same weights, whatever machine each has drawn its own on."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from attnres_train.config import load_config
from attnres_train.parallel import gradients
from attnres_train.parallel.meeting import meet
from attnres_train.parallel.ranks import join_run
from attnres_train.parallel.replicas import broadcast_from_first
from tests.tiny import free_port, grid, torchrun_environment


def broadcast(limit: int) -> list[torch.Tensor]:
    """Runs on every rank: tensors that are this rank's, and what becomes of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "BUCKET_ELEMENTS", limit)
        rank = dist.get_rank()
        tensors = [torch.full((2, 3), float(rank)), torch.full((5,), rank), torch.ones(())]
        tensors += [torch.full((4, 2), float(rank), dtype=torch.bfloat16).T]
        broadcast_from_first(tensors, dist.group.WORLD)
        return tensors


@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_all_have_what_the_first_one_had(pool, limit):
    expected, *others = pool.run(broadcast, 3, limit)
    assert all(
        (tensor == value).all() for tensor, value in zip(expected, [0, 0, 1, 0], strict=True)
    )
    for found in others:
        for tensor, first in zip(found, expected, strict=True):
            assert tensor.dtype == first.dtype and torch.equal(tensor, first)


def chunks_of_mixed_machines(path: str, overrides: list[str], port: int) -> tuple[int, dict]:
    """Runs on every rank: its chunks, whose initial values every rank draws a little
    otherwise, as another CPU does. Returns its stage and the values."""
    from attnres_train.model.init import init_weights
    from attnres_train.planning.build import build_plan
    from attnres_train.training import building

    def init_elsewhere(chunk, seed):
        init_weights(chunk, seed)
        with torch.no_grad():
            for parameter in chunk.parameters():
                parameter.mul_(1 + 1e-6 * dist.get_rank())
            for buffer in chunk.buffers():
                buffer.add_(dist.get_rank())

    config = load_config(path, overrides)
    with (
        torchrun_environment(port),
        meet(300) as meeting,
        join_run(config, meeting) as ranks,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(building, "init_weights", init_elsewhere)
        chunks = building.build_chunks(config, build_plan(config), ranks)
        return ranks.pp_rank, {
            name: value.clone() for c in chunks.values() for name, value in c.state_dict().items()
        }


def test_replicas_on_mixed_machines_begin_alike(pool, tiny):
    found = pool.run(chunks_of_mixed_machines, 4, str(tiny.path), grid(2, 1), free_port())
    for stage in (0, 1):
        first, second = (state for at, state in found if at == stage)
        assert len(first) > 10 and first.keys() == second.keys()
        for name, value in first.items():
            assert torch.equal(value, second[name]), name
