"""What a kind of residual stream answers about itself. No torch: what a kind does once a model is
built is its `Residual`, in modules that are imported then."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

from attnres_train.config.kinds import Kind
from attnres_train.config.model_schema import ModelConfig, ResidualConfig
from attnres_train.errors import UserError
from attnres_train.model.blocks import Blocks
from attnres_train.model.parameters import Learned

if TYPE_CHECKING:
    from attnres_train.config.schema import RunConfig


class ResidualKind(Kind):
    """The residual stream of a model: what `model.residual.kind` names.

    Sublayers (attention or MLP) count from 1 over the whole model; ``num_sublayers + 1`` stands for
    the read of the output head.
    """

    section: ResidualConfig

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model.residual, "model.residual")
        self.model = model

    @property
    def name(self) -> str:
        """The kind as the configuration writes it."""
        return self.section.kind

    @property
    def implementation(self) -> str | type[Any]:
        """The `Residual` that runs the stream: ``module:Name``, imported when a model is built, or
        the class itself (the module of the kind imports torch then)."""
        return "attnres_train.model.residual.stream:Residual"

    @property
    def block_size(self) -> int | None:
        """Sublayers per block; None for a stream without blocks (see `Blocks`)."""
        return None

    @property
    def stream_size(self) -> int:
        """Numbers per token of a block, or of a partial of one unit: what crosses a pipeline
        boundary."""
        return self.model.hidden_size

    @property
    def partial_units(self) -> int:
        """Size of a partial, the running state of an open block, as a multiple of a block's."""
        return 1

    @cached_property
    def plan(self) -> Blocks:
        """The blocks of the model."""
        return Blocks(self.model.num_sublayers, self.block_size, self.partial_units)

    def check(self, config: RunConfig) -> Iterator[str]:
        for key in self.section.variations:
            yield (
                f"{self._said(key)}, but model.residual.kind {self.name} has no attention over "
                "depth: remove it, or choose kind full or block"
            )

    def summary(self) -> str:
        """What follows from the configuration, on one line."""
        options = self.options.model_dump(mode="json")
        about = f"{self.name}: {self.about().rstrip('.')}"
        return "; ".join([about, *(f"{key} {value}" for key, value in options.items())])

    def learned(self, sublayer: int) -> dict[str, Learned]:
        """Parameters of the read before ``sublayer``, by the end of their names: ``scale`` becomes
        ``layers.3.mlp_res_scale``, ``gate.weight`` ``layers.3.mlp_res_gate.weight``."""
        return {}

    def flops(self, sublayer: int) -> float:
        """Forward FLOPs per token of the read before ``sublayer`` and of the write after it, but
        for the sum that the standard residual has too."""
        return 0.0

    def released(self) -> dict[str, Any]:
        """Keys of a released ``config.json`` that say it, besides those of the model.

        Raises UserError where weights cannot be exported: released models have no such residual.
        """
        raise self.unreleased("kind")

    def check_exchange(self) -> None:
        """Raises UserError where weights can be neither exported nor imported. Only a kind that may
        be imported and yet not exported differs from `released`."""
        self.released()

    def unsaid(self) -> Iterator[str]:
        """Values that an exported ``config.json`` has no key for although they are not what its
        readers assume, e.g. ``model.residual.norm_eps is 1e-06``."""
        yield from ()

    def started_afresh(self) -> str:
        """What an import says after "N tensors of" where the released weights lack all that the
        reads learn, which then begins as `learned` says."""
        return f"model.residual.kind {self.name} are not there and start afresh"

    def unreleased(self, key: str) -> UserError:
        """The refusal to exchange weights on account of ``model.residual.<key>``."""
        return UserError(
            f"{self._said(key)}, which released models do not know: only Attention Residuals as in "
            "the paper, or none, are exchanged"
        )

    def _said(self, key: str) -> str:
        value = getattr(self.section, key)
        return f"{self.key}.{key} is {value if key == 'kind' else str(value).lower()}"


def residual_kind(model: ModelConfig) -> ResidualKind:
    """The residual that ``model`` asks for."""
    kind: ResidualKind = model.residual_kind
    return kind
