"""An optimizer of the user's: built, planned, saved and restored like one of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attnres_train.config import load_config
from attnres_train.config.schema import OptimizerConfig
from attnres_train.model.parameters import ParameterRule, constant
from attnres_train.optim.build import build_optimizer
from attnres_train.optim.hybrid import HybridOptimizer
from attnres_train.optim.kinds import OptimizerKind, Part, optimizer_kind
from attnres_train.planning.costs import CostModel
from tests.config.conftest import SMALL
from tests.config.helpers import error_of, write
from tests.optim import lion
from tests.optim.state import copy_state

LION = "tests.optim.lion:LionKind"
SHAPES = {"matrix": (4, 6), "vector": (6,), "scale": (3,)}
RULES = {
    "matrix": ParameterRule(constant(0.0), is_matrix=True),
    "vector": ParameterRule(constant(0.0)),
    "scale": ParameterRule(constant(0.0), weight_decay=False),
}


class SGDKind(OptimizerKind):
    """SGD with momentum, for every parameter."""

    def states(self, part: Part) -> tuple[str, ...]:
        return ("momentum_buffer",)

    def build(self, part, params, device):
        return torch.optim.SGD(params, self.section.lr, momentum=0.9)


class AdamKind(SGDKind):
    """torch's Adam, which counts its steps."""

    def states(self, part: Part) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def build(self, part, params, device):
        return torch.optim.Adam(params, self.section.lr)


class Undeclared(AdamKind):
    def states(self, part: Part) -> tuple[str, ...]:
        return ()


class Replacing(SGDKind):
    def build(self, part, params, device):
        class Momentum(torch.optim.Optimizer):
            def step(self, closure=None):
                for state in self.state.values():
                    state["momentum_buffer"] = state["momentum_buffer"] + 1

        return Momentum(params, {"lr": 0})


class Factored(SGDKind):
    def build(self, part, params, device):
        optimizer = torch.optim.SGD(params, self.section.lr)
        for param in params:
            optimizer.state[param]["rows"] = param.new_zeros(len(param) + 1)
        return optimizer


def own(kind: type[OptimizerKind]) -> str:
    return f"{kind.__module__}:{kind.__name__}"


def make(kind: str, dtype=torch.float64, **options):
    rng = torch.Generator().manual_seed(0)
    params = {
        name: torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in SHAPES.items()
    }
    section = OptimizerConfig(kind=kind, **options)
    return params, build_optimizer(params.items(), RULES, section, "cpu")


def run(params: dict[str, torch.Tensor], optimizer: HybridOptimizer, steps: range) -> None:
    for step in steps:
        rng = torch.Generator().manual_seed(step)
        for param in params.values():
            grad = torch.randn(param.shape, generator=rng, dtype=torch.float64)
            param.grad = grad.to(param.dtype)
        optimizer.step(lr=0.01 * (step + 1))


def test_parameters_move_as_the_users_optimizer_moves_them():
    params, optimizer = make(LION, weight_decay=0.2, options={"slow": 0.5})
    run(params, optimizer, range(3))
    rng = torch.Generator().manual_seed(0)
    for name, shape in SHAPES.items():
        weight = torch.randn(shape, generator=rng, dtype=torch.float64)
        momentum, decay = torch.zeros_like(weight), 0.2 * RULES[name].weight_decay
        for step in range(3):
            grad_rng = torch.Generator().manual_seed(step)
            grads = {
                n: torch.randn(s, generator=grad_rng, dtype=torch.float64)
                for n, s in SHAPES.items()
            }
            lr, grad = 0.01 * (step + 1), grads[name]
            weight = (1 - lr * decay) * weight - lr * (0.9 * momentum + 0.1 * grad).sign()
            momentum = 0.5 * momentum + 0.5 * grad
        torch.testing.assert_close(params[name].detach(), weight, rtol=1e-12, atol=1e-14)


def test_sgd_of_torch_moves_as_alone():
    params, optimizer = make(own(SGDKind))
    alone, _ = make(own(SGDKind))
    single = torch.optim.SGD(alone.values(), lr=1, momentum=0.9)
    run(params, optimizer, range(3))
    for step in range(3):
        rng = torch.Generator().manual_seed(step)
        for param in alone.values():
            param.grad = torch.randn(param.shape, generator=rng, dtype=torch.float64)
        single.param_groups[0]["lr"] = 0.01 * (step + 1)
        single.step()
    assert all(torch.equal(params[name], alone[name]) for name in SHAPES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", [LION, own(SGDKind), own(AdamKind)])
def test_continuing_from_copied_state_is_bitwise(kind, dtype):
    params, optimizer = make(kind, dtype)
    run(params, optimizer, range(2))
    resumed, second = make(kind, dtype)
    copy_state((params, optimizer), (resumed, second))
    run(params, optimizer, range(2, 4))
    run(resumed, second, range(2, 4))
    assert all(torch.equal(params[name], resumed[name]) for name in SHAPES)
    assert any(tensor.count_nonzero() for *_, tensor in second.state_tensors())


def test_state_that_would_not_be_saved_is_an_error():
    for kind in (Undeclared, Replacing):
        params, optimizer = make(own(kind))
        with pytest.raises(ValueError, match="of matrix came with a step or was replaced in it"):
            run(params, optimizer, range(1))
    with pytest.raises(ValueError, match="'rows' of matrix is not of the parameter's shape"):
        make(own(Factored))


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    return write(tmp_path, "small.yaml", SMALL)


def test_the_plan_counts_its_state(small_file):
    def planned(**optimizer) -> tuple[int, int]:
        config = load_config(small_file)
        config.optimizer = OptimizerConfig(**optimizer)
        costs = CostModel(config).chunk(range(4))
        return costs.parameters, costs.optimizer_bytes

    parameters, state = planned(kind=LION)
    assert state == 4 * parameters
    assert planned(kind="adamw") == (parameters, 8 * parameters)


def test_parts_and_summary():
    section = OptimizerConfig(kind=LION, weight_decay=0.2)
    kind = optimizer_kind(section)
    decays = {name: kind.part(name, SHAPES[name], RULES[name]).weight_decay for name in SHAPES}
    assert decays == {"matrix": 0.2, "vector": 0.2, "scale": 0.0}
    assert kind.summary() == f"{LION}: Lion for every parameter; slow 0.99"


def test_an_unknown_option_is_an_error(small_file):
    told = error_of(small_file, f"optimizer.kind={LION}", "optimizer.options={fast: 0.1}")
    assert "optimizer.options.fast" in told
    assert "known here: slow" in told


def test_it_is_short():
    assert len(Path(lion.__file__).read_text().splitlines()) < 40
