"""A residual of the user's: trained, planned and told of like one of ours."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnres_train.commands.export import released_layout
from attnres_train.config import ConfigError, RunConfig, check_config, load_config
from attnres_train.config.model_schema import ModelConfig
from attnres_train.config.schema import OptimizerConfig
from attnres_train.config.summary import describe
from attnres_train.errors import UserError
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.flops import forward_flops_per_token
from attnres_train.model.init import init_weights
from attnres_train.model.parameters import parameter_rules
from attnres_train.model.residual.kind import residual_kind
from attnres_train.optim.build import build_optimizer
from attnres_train.planning.costs import CostModel
from tests.config.conftest import SMALL
from tests.config.helpers import error_of, says, write
from tests.model.residual import layer_scale
from tests.model.residual.reference import sublayers
from tests.model.tiny import (
    assert_same_gradients,
    gradients,
    random_batch,
    run_split,
    tiny_config,
)

KIND = "tests.model.residual.layer_scale:LayerScale"
OVERRIDE = f"model.residual.kind={KIND}"


def config() -> ModelConfig:
    return tiny_config(KIND, residual={"options": {"init": 0.5}})


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    return write(tmp_path, "small.yaml", SMALL)


def chunks_of(*bounds: int, **options) -> list[ModelChunk]:
    chunks = [
        ModelChunk(config(), *pair, dtype=torch.float64, **options) for pair in pairwise(bounds)
    ]
    for chunk in chunks:
        init_weights(chunk, seed=7)
        with torch.no_grad():
            for name, parameter in chunk.named_parameters():
                if name.endswith("_scale"):
                    rng = torch.Generator().manual_seed(sum(name.encode()))
                    parameter.add_(torch.rand(parameter.shape, generator=rng))
    return chunks


def loss_and_gradients(chunks: list[ModelChunk]) -> tuple[Tensor, dict[str, Tensor]]:
    loss = run_split(chunks, random_batch()).loss
    loss.backward()
    return loss.detach(), gradients(chunks)


def test_it_is_short():
    assert len(Path(layer_scale.__file__).read_text().splitlines()) < 40


def test_parameters_and_their_initial_values():
    chunk = ModelChunk(config(), 0, 5)
    init_weights(chunk, seed=1)
    found = {name: p for name, p in chunk.named_parameters() if "_res" in name}
    reads = ("self_attention_res_scale", "mlp_res_scale")
    assert list(found) == [f"layers.{i}.{read}" for i in range(5) for read in reads]
    for parameter in found.values():
        assert parameter.shape == (16,)
        assert (parameter == 0.5).all()
    standard = ModelChunk(tiny_config("standard"), 0, 5)
    init_weights(standard, seed=1)
    others = {name: p for name, p in chunk.named_parameters() if name not in found}
    assert others.keys() == dict(standard.named_parameters()).keys()
    assert all(torch.equal(p, others[name]) for name, p in standard.named_parameters())


def test_scales_are_vectors_that_do_not_decay_to_the_optimizer():
    chunk = ModelChunk(config(), 0, 5)
    init_weights(chunk, seed=1)
    named = dict(chunk.named_parameters())
    rules = parameter_rules(chunk)
    optimizer = build_optimizer(named.items(), rules, OptimizerConfig(weight_decay=1.0), "cpu")
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer.step(lr=0.1)  # gradients that are None count as zero: weights decay, and no more
    for name, parameter in named.items():
        decays = not name.endswith(("_scale", "A_log", "dt_bias"))
        torch.testing.assert_close(parameter.detach(), before[name] * (0.9 if decays else 1))
    keys = {key for name, key, _ in optimizer.state_tensors() if name.endswith("_scale")}
    assert keys == {"exp_avg", "exp_avg_sq"}


def test_equals_its_formula():
    loss, grads = loss_and_gradients(chunks_of(0, 5))
    (chunk,) = chunks_of(0, 5)
    batch, named = random_batch(), dict(chunk.named_parameters())
    x = chunk.embed_tokens(batch.tokens)
    for prefix, f in sublayers(chunk):
        x = x + named[f"{prefix}_scale"] * f(x)
    logits = chunk.lm_head(chunk.norm(x)).flatten(0, 1)
    each = F.cross_entropy(logits, batch.labels.flatten(), reduction="none")
    mask = batch.loss_mask.double().flatten()
    expected = (each * mask).sum() / mask.sum()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    assert_same_gradients(gradients([chunk]), grads, rtol=1e-9, floor=1e-4)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_two_chunks_equal_one(recompute):
    loss, grads = loss_and_gradients(chunks_of(0, 5))
    split_loss, split_grads = loss_and_gradients(chunks_of(0, 2, 5, recompute=recompute))
    torch.testing.assert_close(split_loss, loss, rtol=1e-13, atol=0)
    assert_same_gradients(grads, split_grads, rtol=1e-11)


def test_its_line_of_the_summary(small_file):
    run = load_config(small_file, [OVERRIDE, "model.residual.options.init=0.25"])
    check_config(run)
    assert (
        f"residual       {KIND}: One running sum of outputs times learned vectors; init 0.25\n"
    ) in describe(run, [4])


def test_costs_ask_it(small_file):
    run = load_config(small_file, [OVERRIDE])
    standard = load_config(small_file, ["model.residual.kind=standard"])
    ours, theirs = (CostModel(c).chunk(range(4)).parameters for c in (run, standard))
    assert ours == theirs + 8 * 64
    assert forward_flops_per_token(run.model, 32) == forward_flops_per_token(standard.model, 32)


def test_options_of_depth_attention_are_an_error(small_file):
    run = load_config(small_file, [OVERRIDE, "model.residual.window=8"])
    with pytest.raises(ConfigError) as error:
        check_config(run)
    told = f"model.residual.window is 8, but model.residual.kind {KIND} has no attention"
    says(error.value.problems, told)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ("{inti: 0.1}", ["model.residual.options.inti", "unknown key", "init"]),
        ("{init: 0}", ["model.residual.options.init", "not 0"]),
    ],
)
def test_wrong_options_are_errors(small_file, options, parts):
    told = error_of(small_file, OVERRIDE, f"model.residual.options={options}")
    assert all(part in told for part in parts), told


def test_weights_cannot_be_exchanged():
    told = f"model.residual.kind is {KIND}, which released models do not know"
    with pytest.raises(UserError, match=told):  # `export` asks for the keys of config.json
        residual_kind(config()).released()
    with pytest.raises(UserError, match=told):  # `import` for names and shapes
        released_layout(config())


def test_gates_on_norms_cannot_be_exchanged():
    gated = tiny_config("standard", residual={"norm_gate_rank": 2})
    with pytest.raises(UserError, match=r"norm_gate_rank is 2, which released models do not know"):
        released_layout(gated)


def test_its_options_are_saved_with_the_run(small_file):
    run = load_config(small_file, [OVERRIDE, "model.residual.options.init=0.25"])
    again = RunConfig.model_validate(run.model_dump(mode="json"))
    assert residual_kind(again.model).options.init == 0.25
