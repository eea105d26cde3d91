from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from attnres_train.checkpoint.drift import digests, drifted, told

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8]
)
def test_another_bit_anywhere_is_another_digest(dtype, monkeypatch):
    monkeypatch.setattr("attnres_train.checkpoint.drift._CHUNK", 4)
    tensor = torch.arange(10).remainder(2).to(dtype)
    (before,) = digests([tensor], CPU)
    for index in range(10):
        other = tensor.clone()
        other[index] = 1 - other[index].int()
        assert digests([other], CPU) != before
    assert digests([tensor.clone()], CPU) == before
    assert digests([tensor.flip(0)], CPU) != before


def compare() -> dict[str, list[int]]:
    rank = dist.get_rank()
    tensors = {"a": torch.ones(3), "b": torch.ones(2, 2), "c": torch.tensor(1)}
    if rank == 2:
        tensors["b"][1, 1] = 1 + 2**-23
    group = [dist.new_group([0, 2]), dist.new_group([1])][rank % 2]
    return drifted(tensors, group, CPU)


def test_tensor_and_rank_are_named(pool):
    assert pool.run(compare, 3) == [{"b": [2]}, {}, {"b": [2]}]


def test_what_is_told():
    assert told([{}, {}], 3) is None
    text = told([{}, {"b": [2, 3]}], 7)
    assert "after step 7 " in text and "b on rank 2, 3." in text
