"""Which matrices are whose, and what head by head means."""

from __future__ import annotations

import pytest
import torch

from attnres_train.config.schema import OptimizerConfig
from attnres_train.model.parameters import parameter_rules
from attnres_train.optim.kinds import MuonKind
from attnres_train.optim.muon import Muon
from tests.model.tiny import build, tiny_config

LOW_RANK = ("f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")


def adamws(**options) -> set[str]:
    """Last module names of the matrices that are AdamW's."""
    chunk, kind = build(tiny_config()), MuonKind(OptimizerConfig(**options), "optimizer")
    rules = parameter_rules(chunk)
    parts = {n: kind.part(n, tuple(p.shape), rules[n]) for n, p in chunk.named_parameters()}
    names = [n for n, part in parts.items() if part.optimizer == "adamw" and rules[n].is_matrix]
    return {name.split(".")[-2] for name in names}


def test_router_and_low_rank_factors_are_adamws_if_asked_for():
    assert adamws() == set()
    assert adamws(adamw_matrices=["router"]) == {"gate"}
    assert adamws(adamw_matrices=["low_rank"]) == set(LOW_RANK)
    assert adamws(adamw_matrices=["router", "low_rank"]) == {"gate", *LOW_RANK}


def test_heads_are_maps_to_queries_keys_and_values():
    chunk, kind = build(tiny_config()), MuonKind(OptimizerConfig(per_head=True), "optimizer")
    rules = parameter_rules(chunk)
    shapes = {name: tuple(p.shape) for name, p in chunk.named_parameters()}
    by_head = {
        name.split(".")[-2]: shapes[name][0] // part.heads
        for name in shapes
        if (part := kind.part(name, shapes[name], rules[name])).heads > 1
    }
    # KDA's heads are 8 wide; MLA's q_proj is 8 + 4 of each, kv_b_proj 8 + 8.
    assert by_head == {"q_proj": 12, "k_proj": 8, "v_proj": 8, "kv_b_proj": 16}


@pytest.mark.parametrize("batch", [1, 2**26])
def test_a_map_to_heads_moves_as_its_heads_would_by_themselves(batch):
    generator = torch.Generator().manual_seed(0)
    values, grads = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    options = {"lr": 0.1, "ns_dtype": torch.float64, "max_batch_elements": batch}
    whole = values.clone()
    apart = [head.clone() for head in values.split(2)]
    optimizers = Muon([whole], **options, heads=3), Muon(apart, **options)
    for step in (1, 2):
        whole.grad = grads * step
        for head, grad in zip(apart, grads.split(2), strict=True):
            head.grad = grad * step
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(whole, torch.cat(apart), rtol=1e-12, atol=0)
    assert not torch.equal(whole, values)


def test_heads_have_to_fit():
    with pytest.raises(ValueError, match="matrices, not a shape"):
        Muon([torch.zeros(5, 4)], 0.1, heads=2)
