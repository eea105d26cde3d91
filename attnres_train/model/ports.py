"""What a model asks of its peers, and the answers of one process that has none.

The model is single-process code. Where it depends on other ranks it asks a port; `parallel/` has
those that talk to peers, and `building.build_chunks` hands them in. The port of split tensors is in
`model.split`.

Shapes: N tokens, D hidden size, K experts per token, E experts of a layer. Of sequences: B samples,
S shares of t tokens that are here of each (`model.shares`), R = B S rows; T tokens of a sample; H
heads, K key size, V value size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from attnres_train.config.model_schema import ModelConfig
from attnres_train.model.moe.permutation import Copies, Permutation
from attnres_train.model.shares import Shares
from attnres_train.model.split import TensorSplit, Whole


class SortedPairs(Copies, Protocol):
    """(Token, expert) pairs sorted by expert: ``order`` int64 [pairs], which pair each row is;
    ``ends`` int32 [experts here], the end of each expert's rows."""

    @property
    def order(self) -> Tensor: ...

    @property
    def ends(self) -> Tensor: ...


@dataclass(frozen=True)
class Routed:
    """What the experts here are to compute: ``tokens`` [M, D], of whichever rank, and pairs of them
    and experts here, with a weight each, [pairs]."""

    tokens: Tensor
    weights: Tensor
    pairs: SortedPairs


class Sent(Protocol):
    """Tokens of this rank on their way to their experts, and those of others on their way here."""

    @property
    def load(self) -> Tensor:
        """Tokens of this rank per expert, int64 [E]."""
        ...

    def arrived(self) -> Routed:
        """Wait for what comes here."""
        ...

    def back(self, sums: Tensor) -> Tensor:
        """From the weighted sums over the experts here, [M, D], those over all experts, [N, D]."""
        ...


class TokenExchange(Protocol):
    """Where tokens meet their experts."""

    @property
    def experts(self) -> range:
        """The experts of every layer that are here."""
        ...

    @property
    def bytes_sent(self) -> int:
        """What this rank has sent to others so far."""
        ...

    @property
    def overflow(self) -> Tensor | int:
        """Rows and pairs that have found no room on this rank so far, each time that they were
        computed; where there was one, the loss is NaN."""
        ...

    def send(self, tokens: Tensor, experts: Tensor, weights: Tensor, dtype: torch.dtype) -> Sent:
        """Send ``tokens`` [N, D] to the ranks of their ``experts``, int64 [N, K], whose outputs are
        to be summed with ``weights`` [N, K]; ``dtype`` is that in which experts compute.

        Returns at once: what the caller does before `Sent.arrived` is done meanwhile.
        """
        ...


class AllHere:
    """The exchange of one process: all experts are here, and tokens stay where they are."""

    def __init__(self, num_experts: int) -> None:
        self.experts = range(num_experts)
        self.bytes_sent = self.overflow = 0

    def send(self, tokens: Tensor, experts: Tensor, weights: Tensor, dtype: torch.dtype) -> Sent:
        permutation = Permutation.sort(experts, len(self.experts))
        return _Stayed(Routed(tokens, weights.flatten(), permutation), permutation.load)


@dataclass(frozen=True)
class _Stayed:
    routed: Routed
    load: Tensor

    def arrived(self) -> Routed:
        return self.routed

    def back(self, sums: Tensor) -> Tensor:
        return sums


Recurrence = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""(values [R, t, H, V], states [R, H, K, V] in front of the rows, None for empty ones) -> (outputs
[R, t, H, V], states after the rows or None). Linear in values and states together."""


class SequenceExchange(Protocol):
    """Where tokens meet those in front of them."""

    @property
    def shares(self) -> Shares:
        """What is here of every sample."""
        ...

    @property
    def bytes_sent(self) -> int:
        """What this rank has sent to others so far."""
        ...

    def led(self, rows: Sequence[Tensor], tokens: int) -> list[Tensor]:
        """Rows [R, t, ...] with the ``tokens`` in front of each, zeros in front of a sample:
        [R, tokens + t, ...]. As they are where every row is a sample."""
        ...

    def recur(self, recurrence: Recurrence, values: Tensor, key_size: int) -> Tensor:
        """The outputs of ``recurrence`` over the rows of ``values`` [R, t, H, V], each of which
        begins with the state that the tokens in front of it leave."""
        ...

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """From parts [B, S t, ...] those of all tokens of the samples, from the first to the last
        that is here."""
        ...


class Past(SequenceExchange, Protocol):
    """What a layer knows of the tokens in front of those of a pass, which go on from there: for
    `SequenceExchange` the tokens of earlier passes are in front. It has all rows to itself, and
    takes up the tokens of the pass for the next one. No gradient. Training has none."""

    @property
    def begins(self) -> Tensor | None:
        """Of what `SequenceExchange.gather` gives, where each sample begins: int64 [B]; what lies
        before is no token of it. None: all begin at 0."""
        ...


class WholeSamples:
    """The exchange of one process: samples are whole, and nothing is in front of them."""

    def __init__(self) -> None:
        self.shares = Shares()
        self.bytes_sent = 0

    def led(self, rows: Sequence[Tensor], tokens: int) -> list[Tensor]:
        return list(rows)

    def recur(self, recurrence: Recurrence, values: Tensor, key_size: int) -> Tensor:
        return recurrence(values, None)[0]

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return list(parts)


@dataclass(frozen=True)
class Ports:
    """All that a chunk asks of its peers."""

    exchange: TokenExchange
    split: TensorSplit = field(default_factory=Whole)
    sequence: SequenceExchange = field(default_factory=WholeSamples)

    @classmethod
    def of_one_process(cls, model: ModelConfig) -> Ports:
        return cls(exchange=AllHere(model.moe.num_experts))
