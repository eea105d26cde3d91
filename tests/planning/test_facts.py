"""What follows from a config by its model: counted parameters against what is built."""

from __future__ import annotations

import pytest
import torch

from attnres_train.config import load_config
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.flops import training_flops_per_token
from attnres_train.planning.facts import count_parameters, facts

CPU = torch.device("cpu")


def test_active_parameters_leave_out_the_experts_that_are_not_chosen():
    model = load_config("configs/quickstart.yaml").model
    chunk = ModelChunk(model, 0, model.num_layers)
    total = sum(p.numel() for p in chunk.parameters())
    an_expert = 3 * model.hidden_size * model.moe.intermediate_size
    left_out = 7 * (8 - 2) * an_expert  # layers with experts x experts that are not chosen
    state = torch.get_rng_state()
    assert count_parameters(model) == (total, total - left_out)
    assert torch.equal(state, torch.get_rng_state())  # counting draws no weights


def test_the_released_model():
    count = count_parameters(load_config("configs/kimi_linear_48b.yaml").model)
    assert 49.1e9 < count.total < 49.2e9
    assert 3.4e9 < count.active < 3.6e9  # "48B-A3B"


def test_without_experts_all_are_active():
    config = load_config("configs/quickstart.yaml", ["model.moe.first_dense_layers=8"])
    count = count_parameters(config.model)
    assert count.total == count.active
    assert facts(config, CPU)["parameters"] == f"{count.total:,}, active per token {count.total:,}"


def test_flops():
    config = load_config("configs/quickstart.yaml")
    per_token = training_flops_per_token(config.model, config.train.seq_length)
    text = facts(config, CPU)["FLOPs"]
    assert f"= {per_token / 1e6:.3g} MFLOP per trained token, x 4,096 = " in text
    assert f"= {per_token * 4096 / 1e9:.3g} GFLOP per step" in text
    apart = load_config("configs/quickstart.yaml", ["data.reset_at_documents=true"])
    assert facts(apart, CPU)["FLOPs"] == f"at most {text}"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_params"])
def test_device_and_precision(precision):
    config = load_config("configs/quickstart.yaml", [f"train.precision={precision}"])
    lines = facts(config, CPU)
    assert lines["precision"].startswith(f"{precision}: ")
    assert ("bf16" in lines["precision"].partition(": ")[2]) == (precision != "fp32")
    assert lines["device"] == "cpu (auto: no CUDA here), gloo between processes"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_a_device_that_is_not_there():
    config = load_config("configs/quickstart.yaml", ["train.device=cuda"])
    assert "not there" in facts(config, torch.device("cuda", 0))["device"]
