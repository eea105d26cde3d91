"""Context parallelism: ranks share the tokens of the same samples, and ask each other for what lies
in front of their own.

A sample is cut into twice as many shares as there are ranks, and each rank has one from either end:
whatever is causal costs them all the same. Three things travel per layer, as little as can be:

- the inputs of a short convolution that reach over a cut, to the rank behind it;
- KDA's part in the state of what follows it, of a size that no length changes: a share makes
  A S + B of the state S in front of it;
- MLA's latents, of which every head's keys and values are made.

Shapes: C ranks, B samples, S = 2 shares of t tokens here of 2C, R = B S rows; H heads, K key size,
V value size; P channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from attnres_train.model.ports import Recurrence, SequenceExchange, WholeSamples
from attnres_train.model.shares import Shares
from attnres_train.parallel.shares import Fronts, Gather, Scan, ShareGroup


def sequence_exchange(group: ProcessGroup) -> SequenceExchange:
    """The exchange among the ranks of ``group``."""
    return WholeSamples() if group.size() == 1 else ContextExchange(group)


class ContextExchange:
    """`model.ports.SequenceExchange` over ``group``.

    All ranks of the group make the same calls in the same order. What is summed is summed in the
    order of shares or ranks, the same on all of them. ``bytes_sent`` counts what this rank has sent
    to others, forward and backward.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.peers = ShareGroup(group)

    @property
    def shares(self) -> Shares:
        return self.peers.shares

    @property
    def bytes_sent(self) -> int:
        return self.peers.bytes_sent

    def led(self, rows: Sequence[Tensor], tokens: int) -> list[Tensor]:
        if not tokens:
            return list(rows)
        # The last tokens of all in one message.
        ends = torch.cat([x[:, -tokens:] for x in rows], dim=-1)
        fronts = Fronts.apply(self.peers, self._by_sample(ends)).flatten(0, 1)
        fronts = fronts.split([x.shape[-1] for x in rows], dim=-1)
        return [torch.cat(pair, dim=1) for pair in zip(fronts, rows, strict=True)]

    def recur(self, recurrence: Recurrence, values: Tensor, key_size: int) -> Tensor:
        after, outputs = from_any_state(recurrence, values, key_size)
        return outputs(Scan.apply(self.peers, self._by_sample(after)).flatten(0, 1))

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        together = self.shares.rows(torch.cat(list(parts), dim=-1))
        gathered = Gather.apply(self.peers, self._by_sample(together))
        return list(gathered.split([x.shape[-1] for x in parts], dim=-1))

    def _by_sample(self, rows: Tensor) -> Tensor:
        """[R, ...] -> [B, S, ...]."""
        return rows.unflatten(0, (-1, len(self.shares.own)))


def from_any_state(
    recurrence: Recurrence, values: Tensor, key_size: int
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """``recurrence`` over ``values`` [R, t, H, V], before the states in front of the rows are
    known: [B | A], [R, H, K, V + K], of the states A S + B after them, and what makes the outputs
    [R, t, H, V] of the states S, [R, H, K, V]."""
    rows, _, heads, value_size = values.shape
    # A recurrence is linear in values and state. Beside the values, from an empty state, run zeros
    # from the identity: they become A and what the state in front adds to the outputs.
    through = values.new_zeros(*values.shape[:-1], key_size)
    wide = torch.promote_types(values.dtype, torch.float32)
    start = values.new_zeros(rows, heads, key_size, value_size + key_size, dtype=wide)
    start[..., value_size:] = torch.eye(key_size, dtype=wide, device=values.device)
    o, after = recurrence(torch.cat((values, through), dim=-1), start)
    assert after is not None
    own, through = o.split([value_size, key_size], dim=-1)

    def outputs(entering: Tensor) -> Tensor:
        # [R, t, H, K] times [R, H, K, V]
        more = through.transpose(1, 2) @ entering.to(through.dtype)
        return own + more.transpose(1, 2)

    return after, outputs
