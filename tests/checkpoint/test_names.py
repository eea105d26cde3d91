from __future__ import annotations

import pytest
import torch

from attnres_train.checkpoint.names import training_state
from attnres_train.model.naming import released_tensors
from tests.checkpoint.toy import Toy


def test_names_are_global_and_experts_single():
    names = set(Toy([4], seed=0).state())
    layer = "model.layers.4"
    expert = f"{layer}.block_sparse_moe.experts.2.w1.weight"
    assert {f"{layer}.self_attn.A_log", expert} < names
    assert {f"optimizer.momentum_buffer.{expert}", "optimizer.steps"} < names
    assert f"optimizer.exp_avg_sq.{layer}.mlp_res_proj.weight" in names
    parameters, moments = 3 + 3, (1 + 3) + 2 * 2
    assert len(names) == parameters + moments + 1


def test_views_write_through_to_the_stack():
    toy = Toy([0], seed=0)
    name = "layers.0.block_sparse_moe.experts.w1"
    view = toy.state()[f"model.{name[:-3]}.1.w1.weight"]
    view.fill_(7)
    assert (toy.params[name][1] == 7).all()
    assert not (toy.params[name][0] == 7).any()


def test_the_weights_alone_have_no_optimizer_names():
    toy = Toy([0], seed=0)
    names = training_state(toy.params.items(), None, released_tensors)
    assert all(name.startswith("model.") for name in names)


def test_a_name_that_comes_twice_is_an_error():
    pairs = [("norm.weight", torch.zeros(2)), ("norm.weight", torch.ones(2))]
    with pytest.raises(ValueError, match=r"more than one tensor named model\.norm\.weight"):
        training_state(pairs, None, released_tensors)
