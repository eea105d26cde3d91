"""The port of split tensors: what of a layer's heads, widths and vocabulary is here, and where all
tokens meet them. One process has all of them.

The residual stream has some of the tokens here. A sublayer that needs all of them gathers them
once, computes with its part of the heads or of the width, and scatters its sums once: each rank
gets the total for its own tokens. Gradients go the same ways back, so that what a rank computes of
a whole parameter's gradient is its own part of a sum: over its tokens in the stream, over its heads
or columns between `TensorSplit.gather` and `TensorSplit.scatter`.

Shapes: B samples, T tokens, S those of them in the stream here, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor, nn

MakeLinear = Callable[[int, int], nn.Module]
"""(features in, features out) -> a linear map without bias whose parameter is ``weight``."""


def plain_linear(features_in: int, features_out: int) -> nn.Linear:
    """torch's."""
    return nn.Linear(features_in, features_out, bias=False)


class Vocabulary(Protocol):
    """The entries that are here, of all V."""

    @property
    def here(self) -> range: ...

    def embedding(self, width: int) -> nn.Module:
        """int64 [B, T], of the whole vocabulary -> [B, S, D]; its ``weight`` has the rows here."""
        ...

    def highest(self, values: Tensor) -> Tensor:
        """``values``, found among the entries here, become the highest among all. May be done in
        place; no gradient."""
        ...

    def total(self, sums: Tensor) -> Tensor:
        """As `highest`: ``sums`` over the entries here become those over all."""
        ...

    def join(self, logits: Tensor) -> Tensor:
        """Logits of the entries here [..., V here] -> those of all [..., V], on every rank."""
        ...


class TensorSplit(Protocol):
    """How tensors and the tokens of the stream are split. All ranks of it make the same calls in
    the same order."""

    def share(self, size: int) -> range:
        """Which are here of ``size`` heads, columns, tokens: consecutive ones, as many on every
        rank."""
        ...

    def whole(self, shape: Sequence[int], axis: int | None) -> tuple[int, ...]:
        """The shape of all of a tensor of which ``shape`` is here, split along ``axis`` (None: it
        is not)."""
        ...

    def mine(self, tensor: Tensor, axis: int | None) -> Tensor:
        """The view of a whole ``tensor`` that belongs here."""
        ...

    def column(self, features_in: int, features_out: int) -> nn.Module:
        """A linear map to the ``features_out`` that are here: rows of its weight."""
        ...

    def row(self, features_in: int, features_out: int) -> nn.Module:
        """A linear map of the ``features_in`` that are here: columns of its weight. Its outputs are
        parts of sums, for `scatter`."""
        ...

    def stream(self, tokens: int) -> range:
        """Which of ``tokens`` are in the stream here in a pass that is `passing`: a share, but all
        where they cannot be shared evenly, such as the one of a step of decoding."""
        ...

    def passing(self, tokens: int) -> AbstractContextManager[None]:
        """The context of a pass over ``tokens`` of a sample, however many: no gradient. Without it
        the stream is shared."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """[B, S, D] of the tokens here -> [B, T, D] of all."""
        ...

    def scatter(self, x: Tensor) -> Tensor:
        """Parts of sums [B, T, D] of all tokens -> sums [B, S, D] of those here."""
        ...

    def vocabulary(self, size: int) -> Vocabulary: ...


class WholeVocabulary:
    """All entries are here."""

    def __init__(self, size: int) -> None:
        self.here = range(size)

    def embedding(self, width: int) -> nn.Module:
        return nn.Embedding(len(self.here), width)

    def highest(self, values: Tensor) -> Tensor:
        return values

    def total(self, sums: Tensor) -> Tensor:
        return sums

    def join(self, logits: Tensor) -> Tensor:
        return logits


class Whole:
    """The split of one process: everything is here. ``linear`` makes the maps."""

    def __init__(self, linear: MakeLinear = plain_linear) -> None:
        self.linear = linear

    def share(self, size: int) -> range:
        return range(size)

    def whole(self, shape: Sequence[int], axis: int | None) -> tuple[int, ...]:
        return tuple(shape)

    def mine(self, tensor: Tensor, axis: int | None) -> Tensor:
        return tensor

    def column(self, features_in: int, features_out: int) -> nn.Module:
        return self.linear(features_in, features_out)

    def row(self, features_in: int, features_out: int) -> nn.Module:
        return self.linear(features_in, features_out)

    def stream(self, tokens: int) -> range:
        return range(tokens)

    def passing(self, tokens: int) -> AbstractContextManager[None]:
        return nullcontext()

    def gather(self, x: Tensor) -> Tensor:
        return x

    def scatter(self, x: Tensor) -> Tensor:
        return x

    def vocabulary(self, size: int) -> Vocabulary:
        return WholeVocabulary(size)
