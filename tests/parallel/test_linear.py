"""Who makes linear maps. Transformer Engine needs a GPU: a stand-in has its place here."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from attnres_train.config.schema import TrainSection
from attnres_train.model.split import Whole, plain_linear
from attnres_train.parallel import linear
from attnres_train.parallel.linear import differs, engine_maps, linear_maps

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class StandIn(nn.Linear):
    """Made as Transformer Engine's is."""


class Doubling(StandIn):
    def forward(self, x):
        return 2 * super().forward(x)


class Failing(StandIn):
    def forward(self, x):
        raise RuntimeError("no kernel image is available")


@pytest.fixture
def engine(monkeypatch):
    """Have ``transformer_engine`` be what has this class of linear maps."""

    def install(cls: type[nn.Module]) -> None:
        module = SimpleNamespace(Linear=cls)
        monkeypatch.setitem(sys.modules, "transformer_engine", SimpleNamespace(pytorch=module))
        monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)

    return install


def maps(backend: str, device: torch.device):
    train = TrainSection(train_iters=1, seq_length=8, global_batch_size=1, backend=backend)
    return linear_maps(train, device, torch.float32, None)


def test_torch_makes_them_where_there_is_nothing_else():
    assert maps("torch", CUDA) is maps("auto", CPU) is maps("auto", CUDA) is plain_linear
    with pytest.raises(ImportError):
        maps("te", CUDA)


def test_te_is_taken_where_it_is_installed(engine, monkeypatch):
    engine(StandIn)
    assert maps("torch", CUDA) is maps("auto", CPU) is plain_linear
    monkeypatch.setattr(linear, "differs", lambda *of: "")
    for backend in ("te", "auto"):
        made = Whole(maps(backend, CUDA)).column(6, 4)
        assert isinstance(made, StandIn) and made.weight.shape == (4, 6) and made.bias is None


@pytest.mark.parametrize("precision", [(torch.float32, None), (torch.float32, torch.bfloat16)])
def test_a_small_map_is_compared_with_torchs(engine, precision):
    for cls, told in ((StandIn, ""), (Doubling, "give another output"), (Failing, "fail (Runtime")):
        engine(cls)
        found = differs(engine_maps(), CPU, *precision)
        assert found.startswith(told) and bool(found) == bool(told)


def test_auto_goes_on_with_torch_where_te_does_not_work(engine, monkeypatch, caplog):
    engine(Failing)
    compare = linear.differs
    monkeypatch.setattr(linear, "differs", lambda make, _, *of: compare(make, CPU, *of))
    assert maps("auto", CUDA) is plain_linear
    assert "no kernel image is available" in caplog.text
