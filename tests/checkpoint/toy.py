"""A toy model under chunk names: a few tensors per decoder layer, one of them stacked experts."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from attnres_train.checkpoint.names import training_state
from attnres_train.checkpoint.sealed import seal
from attnres_train.config.schema import OptimizerConfig
from attnres_train.model.naming import released_tensors
from attnres_train.model.parameters import ParameterRule, constant
from attnres_train.optim.build import build_optimizer

NUM_LAYERS = 6
EXPERTS = 3


def shapes(layers: Iterable[int]) -> dict[str, tuple[int, ...]]:
    table = {}
    for i in layers:
        table[f"layers.{i}.self_attn.q_proj.weight"] = (4, 5)
        table[f"layers.{i}.self_attn.A_log"] = (1, 1, 2, 1)
        table[f"layers.{i}.mlp_res_proj.weight"] = (1, 5)
        table[f"layers.{i}.block_sparse_moe.experts.w1"] = (EXPERTS, 2, 5)
    return table


def rules(names: Iterable[str]) -> dict[str, ParameterRule]:
    """Those that a model has for these parameters; nothing is initialised by them."""
    matrices = ("q_proj.weight", "experts.w1")
    return {
        name: ParameterRule(
            constant(0.0),
            is_matrix=name.endswith(matrices),
            weight_decay=not name.endswith("A_log"),
        )
        for name in names
    }


class Toy:
    """Parameters and optimizer of the given decoder layers. Every tensor is drawn from its name, so
    whoever holds a layer can tell what its values must be."""

    def __init__(self, layers: Iterable[int], seed: int, dtype=torch.float32, **optimizer) -> None:
        self.params = {
            name: nn.Parameter(draw(shape, seed, name).to(dtype))
            for name, shape in shapes(layers).items()
        }
        config = OptimizerConfig(ns_dtype="fp32", **optimizer)
        self.optimizer = build_optimizer(self.params.items(), rules(self.params), config, "cpu")

    def fill(self, seed: int) -> Toy:
        """Give every tensor of the training state values of its own."""
        for name, tensor in self.state().items():
            tensor.copy_(draw(tensor.shape, seed, name) * 10)
        return self

    def state(self) -> dict[str, Tensor]:
        return training_state(self.params.items(), self.optimizer, released_tensors)

    def train(self, steps: Iterable[int]) -> None:
        for step in steps:
            for name, param in self.params.items():
                param.grad = draw(param.shape, step, name).to(param.dtype)
            self.params["layers.0.mlp_res_proj.weight"].grad = None
            self.optimizer.step(lr=0.01 * step)


def draw(shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    gen = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.randn(shape, generator=gen)


def rewrite_meta(meta: Path, change: Callable[[dict], None]) -> None:
    """Change what a ``meta.json`` says, as whoever wrote it might have said it."""
    content = json.loads(meta.read_bytes())
    del content["crc32"]
    change(content)
    meta.write_bytes(seal(content))


def step_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
