"""Gradients over replicas, on real process groups."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from attnres_train.parallel import gradients
from attnres_train.parallel.gradients import average_gradients, sum_over

SHAPES = [(3, 4), (), (5,)]


def average(rank_gradients: list[list[torch.Tensor | None]]) -> list[torch.Tensor]:
    """Runs on every rank: average the gradients that are this rank's."""
    mine = rank_gradients[dist.get_rank()]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    parameters.append(nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)))
    for parameter, gradient in zip(parameters, mine, strict=True):
        parameter.grad = gradient
    average_gradients(parameters, dist.group.WORLD)
    assert sum_over(torch.tensor(dist.get_rank() + 1), dist.group.WORLD) == sum(
        range(1, dist.get_world_size() + 1)
    )
    return [parameter.grad for parameter in parameters]


def random_gradients(seed: int) -> list[torch.Tensor | None]:
    rng = torch.Generator().manual_seed(seed)
    grads = [torch.randn(shape, generator=rng) for shape in SHAPES]
    return [*grads, torch.tensor([seed, 2.0], dtype=torch.bfloat16)]


def test_the_mean_over_replicas_reaches_all_in_their_own_dtype(pool):
    given = [random_gradients(seed) for seed in range(3)]
    given[1][0] = None  # a replica whose parameter got no gradient counts as zero
    found = pool.run(average, 3, given)
    for index in range(len(given[0])):
        parts = [torch.zeros_like(given[0][index]) if g[index] is None else g[index] for g in given]
        expected = torch.stack(parts).mean(0)
        for replica in found:
            assert replica[index].dtype == given[0][index].dtype
            torch.testing.assert_close(replica[index], expected)
            assert torch.equal(replica[index], found[0][index]), "replicas must not drift apart"


def test_one_replica_keeps_its_gradients_and_fills_the_missing(pool):
    given = random_gradients(1)
    ((first, *rest),) = pool.run(average, 1, [[None, *given[1:]]])
    assert torch.equal(first, torch.zeros(SHAPES[0]))
    for found, expected in zip(rest, given[1:], strict=True):
        assert torch.equal(found, expected)


def test_buckets_hold_one_dtype_and_no_more_than_their_size():
    half = gradients.BUCKET_ELEMENTS // 2
    sizes = [(half, torch.float32), (half, torch.float32), (1, torch.float32), (7, torch.bfloat16)]
    sizes += [(3 * half, torch.float32), (1, torch.float32)]
    tensors = [torch.empty(n, dtype=dtype, device="meta") for n, dtype in sizes]
    buckets = list(gradients.in_buckets(tensors))
    assert [len(bucket) for bucket in buckets] == [2, 1, 1, 1, 1]
    assert [tensor for bucket in buckets for tensor in bucket] == tensors
