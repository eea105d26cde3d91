"""The experts' exchange over NCCL, as far as one GPU goes: a group of one rank, which sends to
itself what it would send to others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from attnres_train.config.model_schema import MoEConfig
from attnres_train.model.moe.layer import MixtureOfExperts
from attnres_train.parallel.experts import ExpertExchange

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
CONFIG = MoEConfig(num_experts=8, num_experts_per_token=3, intermediate_size=32)


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("tokens", [64, 1])
def test_equals_the_layer_without_it(alone, dtype, tolerance, tokens):
    with torch.device("cuda"):
        plain = MixtureOfExperts(64, CONFIG).to(dtype)
        shared = MixtureOfExperts(64, CONFIG, ExpertExchange(8, alone)).to(dtype)
        for parameter in plain.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        shared.load_state_dict(plain.state_dict())
        x = torch.randn(tokens, 64, dtype=dtype, requires_grad=True)
    found = []
    for moe in (plain, shared):
        y, load = moe(x)
        found.append([y, *torch.autograd.grad(y.sin().sum(), [x, *moe.parameters()]), load])
    for mine, expected in zip(*reversed(found), strict=True):
        error = (mine.double() - expected.double()).norm()
        assert error <= tolerance * expected.double().norm()
