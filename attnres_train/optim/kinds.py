"""What a kind of optimizer answers about itself: which parameters it updates how, the state that it
keeps, its checks and its summary. No torch: the optimizers themselves are imported when built."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from attnres_train.config.kinds import Kind, resolve
from attnres_train.config.schema import OptimizerConfig, RunConfig
from attnres_train.model.parameters import ParameterRule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from attnres_train.optim.ports import MatrixExchange


@dataclass(frozen=True)
class Part:
    """Parameters that one torch optimizer updates alike."""

    optimizer: str
    """Which optimizer, where a kind has several."""
    weight_decay: float
    heads: int = 1
    """Matrices that lie one below the other in each parameter, and are updated each by itself."""
    split: int | None = None
    """Of matrices that are updated whole and of which tensor ranks have parts: the axis (-2 or -1)
    along which they are cut."""


class OptimizerKind(Kind, ABC):
    """The optimizer of a run: what `optimizer.kind` names.

    One of your own says at least `build`, and `states` where its optimizer keeps any.
    """

    section: OptimizerConfig
    takes_parts = False
    """Whether it can update parameters of which tensor ranks have parts, also where an element's
    update is not its own affair (`is_elementwise`)."""
    exchange: MatrixExchange | None = None
    """Where what `Part.split` tells of becomes whole; set before `build`. None: it is whole."""

    def summary(self) -> str:
        """What follows from the configuration, on one line."""
        options = self.options.model_dump(mode="json")
        about = f"{self.section.kind}: {self.about().rstrip('.')}"
        return "; ".join([about, *(f"{key} {value}" for key, value in options.items())])

    def part(self, name: str, shape: tuple[int, ...], rule: ParameterRule) -> Part:
        """Where chunk parameter ``name`` (e.g. ``layers.3.self_attn.q_proj.weight``) belongs."""
        return Part("all", self.section.weight_decay if rule.weight_decay else 0.0)

    def states(self, part: Part) -> tuple[str, ...]:
        """Keys of the state tensors that a parameter of ``part`` has, each of the parameter's
        shape, fp32 and zero before the first step. They are saved and restored, as is the number of
        steps (``step``); other state is an error."""
        return ()

    def is_elementwise(self, part: Part) -> bool:
        """Whether each element of a parameter of ``part`` is updated by its own gradient and state
        alone. Then replicas share out its rows (`optimizer.sharded`), and tensor ranks update the
        parts that they have."""
        return False

    def work(self, part: Part, shape: tuple[int, ...]) -> float:
        """FLOPs of one update of a parameter of ``part``, where they count beside reading and
        writing its state. Replicas share these out evenly (`optimizer.sharded`)."""
        return 0.0

    @abstractmethod
    def build(
        self, part: Part, params: list[Tensor], device: torch.device | str
    ) -> torch.optim.Optimizer:
        """The torch optimizer of ``part``. Its learning rate is set before every step; state that
        it does not create by itself is created after `states`."""


class AdamWKind(OptimizerKind):
    """AdamW for every parameter."""

    def check(self, config: RunConfig) -> Iterator[str]:
        betas = self.section.betas
        if not all(0 <= beta < 1 for beta in betas):
            yield f"optimizer.betas is {list(betas)}: both must be at least 0 and below 1"

    def summary(self) -> str:
        section = self.section
        return (
            f"{section.kind}: {self.about().rstrip('.')}; weight decay {section.weight_decay:g}, "
            f"betas {section.betas[0]:g} and {section.betas[1]:g}"
        )

    def part(self, name: str, shape: tuple[int, ...], rule: ParameterRule) -> Part:
        return Part("adamw", super().part(name, shape, rule).weight_decay)

    def states(self, part: Part) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def is_elementwise(self, part: Part) -> bool:
        return part.optimizer == "adamw"

    def build(
        self, part: Part, params: list[Tensor], device: torch.device | str
    ) -> torch.optim.Optimizer:
        from attnres_train.optim.adamw import make_adamw

        return make_adamw(params, part.weight_decay, self.section, device)


class MuonKind(AdamWKind):
    """Muon for matrices, AdamW for the rest.

    Embeddings, head and norms are AdamW's, norms with weight decay (Moonlight, arXiv 2502.16982,
    section 2.2 and appendix D): `ParameterRule.is_matrix` decides. Matrices that tensor ranks share
    are gathered for Newton-Schulz alone (`optim.ports`).
    """

    takes_parts = True

    def summary(self) -> str:
        section = self.section
        by_head = ", head by head" if section.per_head else ""
        left = f", AdamW for {' and '.join(section.adamw_matrices)}" * bool(section.adamw_matrices)
        return f"{super().summary()}, momentum {section.momentum:g}{by_head}{left}"

    def part(self, name: str, shape: tuple[int, ...], rule: ParameterRule) -> Part:
        """Muon takes matrices [A, B] and stacks of them [E, A, B]. Raises ValueError where a rule
        calls something else a matrix: a mistake of whoever adds a module."""
        rest = super().part(name, shape, rule)
        if not rule.is_matrix or rule.role in self.section.adamw_matrices:
            return rest
        if len(shape) not in (2, 3):
            raise ValueError(f"Muon parameter {name!r} is no matrix: shape {shape}")
        if rule.heads and self.section.per_head:
            return Part("muon", rest.weight_decay, rule.heads)  # each of them whole on its rank
        split = None if rule.split is None else rule.split - len(shape)
        return Part("muon", rest.weight_decay, split=split)

    def work(self, part: Part, shape: tuple[int, ...]) -> float:
        """Newton-Schulz's products X X^T, S^2 and S X of matrices of ``A <= B``."""
        if part.optimizer != "muon":
            return super().work(part, shape)
        short, long = sorted((shape[-2] // part.heads, shape[-1]))
        matrices = prod(shape[:-2]) * part.heads
        return self.section.ns_steps * matrices * (4 * short**2 * long + 2 * short**3)

    def states(self, part: Part) -> tuple[str, ...]:
        return ("momentum_buffer",) if part.optimizer == "muon" else super().states(part)

    def build(
        self, part: Part, params: list[Tensor], device: torch.device | str
    ) -> torch.optim.Optimizer:
        from attnres_train.optim.muon import make_muon

        if part.optimizer != "muon":
            return super().build(part, params, device)
        matrices = part.heads, part.split, self.exchange
        return make_muon(params, part.weight_decay, self.section, device, *matrices)


def optimizer_kind(section: OptimizerConfig) -> OptimizerKind:
    """The optimizer that the configuration asks for."""
    kind: type[OptimizerKind] = resolve("optimizer.kind", section.kind)
    return kind(section, "optimizer")
