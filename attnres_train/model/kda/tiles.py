"""The inside of KDA's chunks: decayed products of tokens, batched over chunks and heads.

The weight of key j for query i is ``sum_d q_id k_jd exp(g_(j+1)d + ... + g_id)``. The sum over d is
a matrix product only if the decay splits into a factor of i and one of j, and the usual split
``exp(G_i) exp(-G_j)`` overflows. Here neighbouring blocks of tokens are joined over and over, from
single tokens up to the chunk: for i in the second block and j in the first, the decay up to their
border belongs to j and the decay after it to i. Rows are kept decayed from the start of their
block and keys to its end, so a join multiplies them by the decay over the other block. Factors are
products of decays, at most 1: nothing overflows or cancels, and g = -inf is exact (the secondary
chunking of arXiv 2510.26692, section 3, carried down to single tokens).

Shapes: N tiles (chunks x batch x heads, in that order), C tokens of a chunk, K key size, V value
size. "Rows" are the two readers of keys, q and -beta k, in turn: 2C of them in a tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def to_tiles(x: Tensor, chunks: range, chunk_size: int, dtype: torch.dtype) -> Tensor:
    """[B, T, H, ...] -> [n*B*H, C, ...], the n chunks numbered ``chunks``; zeros after T."""
    x = x[:, chunks.start * chunk_size : chunks.stop * chunk_size]
    missing = len(chunks) * chunk_size - x.shape[1]
    # Tokens of zeros change nothing: g = 0 is no decay, and beta = 0 writes no key.
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    x = x.unflatten(1, (-1, chunk_size)).movedim(3, 1).movedim(2, 0)
    return x.to(dtype).contiguous().flatten(0, 2)


def from_tiles(tiles: Tensor, out: Tensor, chunks: range) -> None:
    """Writes [n*B*H, C, ...] to its place in ``out`` [B, T, H, ...]: `to_tiles` backwards."""
    batch, _, heads = out.shape[:3]
    x = tiles.unflatten(0, (-1, batch, heads)).movedim(0, 2).movedim(1, 3).flatten(1, 2)
    out = out[:, chunks.start * tiles.shape[1] : chunks.stop * tiles.shape[1]]
    out.copy_(x[:, : out.shape[1]])


class _Join(NamedTuple):
    """Operands of joining blocks of m tokens pairwise, b = C / 2m pairs in a tile."""

    rows: Tensor  # [N, b, 2m, K] of the second blocks, decayed from their start
    keys: Tensor  # [N, b, m, K] of the first blocks, decayed to their end
    first_decay: Tensor  # [N, b, 1, K] over the first block
    second_decay: Tensor  # [N, b, 1, K] over the second block


@dataclass
class Tiles:
    """A group of chunks, prepared for the recursion over its chunks."""

    q: Tensor  # [N, C, K]
    k: Tensor  # [N, C, K]
    v: Tensor  # [N, C, V]
    beta: Tensor  # [N, C, 1]
    token_decay: Tensor  # [N, C, K], exp(g)
    rows: Tensor  # [N, 2C, K]: q and -beta k in turn, decayed from the start of the chunk
    keys: Tensor  # [N, C, K], decayed to the end of the chunk
    decay: Tensor  # [N, K, 1] over the whole chunk
    scores: Tensor  # [N, C, C]: q against k up to itself
    inverse: Tensor  # [N, C, C]: (I - scores of -beta k against earlier k)^-1, Eq. 7
    joins: list[_Join]  # only for the backward pass

    @classmethod
    def build(
        cls,
        inputs: Sequence[Tensor],
        chunks: range,
        chunk_size: int,
        dtype: torch.dtype,
        *,
        for_backward: bool,
    ) -> Tiles:
        """The chunks numbered ``chunks`` of the operator's q, k, v, g and beta."""
        q, k, v, g, beta = (to_tiles(x, chunks, chunk_size, dtype) for x in inputs)
        beta = beta.unsqueeze(-1)
        token_decay = _exp(g)
        # Blocks of one token. The state decays before the token reads it and takes its key after
        # that: the decay of its own row, none of its key.
        rows = torch.stack((q * token_decay, -k * (beta * token_decay)), dim=2).flatten(1, 2)
        keys, decay = k.clone(), token_decay
        scores = torch.diag_embed((q * k).sum(-1))
        inverse = torch.diag_embed(torch.ones_like(beta).squeeze(-1))
        joins = []
        m = 1
        while m < chunk_size:
            pair_rows, pair_keys = _pairs(rows, 2 * m)[1], _pairs(keys, m)[0]
            first_decay, second_decay = _pairs(decay, 1)
            if for_backward:  # copies, as the rows and keys are changed in place below
                join = _Join(pair_rows.clone(), pair_keys.clone(), first_decay, second_decay)
                joins.append(join)
            # Every later token of the pair against every earlier one, in a single product.
            corner = pair_rows @ pair_keys.mT
            _corners(scores, m).copy_(corner[:, :, 0::2])
            _join_inverse(inverse, corner[:, :, 1::2])
            # On to the start and the end of the joined block, where the other half is already.
            pair_rows *= first_decay
            pair_keys *= second_decay
            decay = (first_decay * second_decay).squeeze(2)
            m *= 2
        return cls(q, k, v, beta, token_decay, rows, keys, decay.mT, scores, inverse, joins)

    def input_grads(
        self, drows: Tensor, dkeys: Tensor, dscores: Tensor, dvalues: Tensor, ddecay: Tensor
    ) -> tuple[Tensor, ...]:
        """Gradients of q, k, v, g, beta, each shaped like its tiles.

        Takes those of `rows` and `keys` (both overwritten), of the scores of all rows [N, 2C, C],
        of beta v [N, C, V] and of `decay` [N, K]. Gradients of decays go down the tree of joins:
        taken from running sums instead, weak ones would drown in the rounding of others.
        """
        ddecay = ddecay.unsqueeze(1)
        # From the whole chunk back to single tokens, each step undoing one of `build`.
        for join in reversed(self.joins):
            ddecay = _join_grads(join, dscores, drows, dkeys, ddecay)
        dq, dbeta_k = drows.unflatten(1, (-1, 2)).unbind(2)
        ddecay = ddecay.addcmul_(self.q, dq).addcmul_(self.beta * self.k, dbeta_k, value=-1)
        dq, dbeta_k = dq * self.token_decay, dbeta_k * -self.token_decay

        # A query's score against its own key is not in the joins: no decay lies between the two.
        dself = dscores[:, 0::2].diagonal(dim1=1, dim2=2).unsqueeze(-1)
        dq.addcmul_(dself, self.k)
        dk = dkeys.addcmul_(self.beta, dbeta_k).addcmul_(dself, self.q)
        dbeta = (dbeta_k * self.k).sum(-1) + (dvalues * self.v).sum(-1)
        return dq, dk, self.beta * dvalues, ddecay.mul_(self.token_decay), dbeta


def _exp(x: Tensor) -> Tensor:
    """exp of x <= 0, with 0 for what is (nearly) subnormal: those take exp 20 times as long."""
    tiny = torch.finfo(x.dtype).tiny
    # int() rounds the logarithm up: the exponential of the bound is normal yet, and below 2 tiny.
    return torch.threshold_(x.clamp(min=int(math.log(tiny))).exp_(), 2 * tiny, 0)


def _pairs(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """[N, L, ...] -> first and second blocks of the pairs of blocks of m, [N, L / 2m, m, ...]."""
    return x.unflatten(1, (-1, 2, m)).unbind(2)


def _pair_blocks(x: Tensor, m: int) -> Tensor:
    """View [N, b, 2, r, 2, m] of the diagonal blocks of 2m columns of ``x`` [N, 2br, C]: first and
    second half of their rows, of their columns."""
    pairs = x.shape[2] // (2 * m)
    x = x.unflatten(2, (pairs, 2, m)).unflatten(1, (pairs, 2, -1))
    return x.diagonal(dim1=1, dim2=4).movedim(-1, 1)


def _corners(x: Tensor, m: int) -> Tensor:
    """View [N, b, r, m] of `_pair_blocks`: their second rows and first columns."""
    return _pair_blocks(x, m)[:, :, 1, :, 0]


def _join_inverse(inverse: Tensor, corner: Tensor) -> None:
    """Inverts the next larger diagonal blocks in ``inverse`` [N, C, C], whose blocks of m are
    inverted: ``corner`` [N, b, m, m] is what a pair's second tokens take from its first."""
    # With A and B the scores inside the two blocks, [[I - A, 0], [-corner, I - B]] has the inverse
    # [[(I - A)^-1, 0], [(I - B)^-1 corner (I - A)^-1, (I - B)^-1]].
    blocks = _pair_blocks(inverse, corner.shape[-1])
    first, second = blocks[:, :, 0, :, 0], blocks[:, :, 1, :, 1]
    blocks[:, :, 1, :, 0] = second @ corner @ first


def _join_grads(
    join: _Join, dscores: Tensor, drows: Tensor, dkeys: Tensor, ddecay: Tensor
) -> Tensor:
    """Takes the gradients of rows [N, 2C, K] and keys [N, C, K] back over a join, in place. Returns
    that of the blocks' decays [N, 2b, K], given that of the pairs' [N, b, K]."""
    m = join.keys.shape[2]
    dcorner = _corners(dscores, m).contiguous()
    drows, dkeys = _pairs(drows, 2 * m)[1], _pairs(dkeys, m)[0]
    ddecay = ddecay.unsqueeze(2)
    # The decay over the first block multiplied the second one's rows, and the pair's decay is the
    # product of both; the second decay likewise.
    dfirst = (join.rows * drows).sum(2, keepdim=True).addcmul_(ddecay, join.second_decay)
    dsecond = (join.keys * dkeys).sum(2, keepdim=True).addcmul_(ddecay, join.first_decay)
    torch.addcmul(dcorner @ join.keys, drows, join.first_decay, out=drows)
    torch.addcmul(dcorner.mT @ join.rows, dkeys, join.second_decay, out=dkeys)
    return torch.cat((dfirst, dsecond), dim=2).flatten(1, 2)
