"""The inside of KDA's chunks: decayed products of tokens, batched over chunks and heads.

The weight of key j for query i is ``sum_d q_id k_jd exp(g_(j+1)d + ... + g_id)``. The sum over d is
a matrix product only if the decay splits into a factor of i and one of j, and the usual split
``exp(G_i) exp(-G_j)`` overflows. Here a chunk is halved again and again: for i in the second half
and j in the first, the decay up to the border belongs to j and the decay behind it to i. Every
exponent is then a sum of log-decays, at most 0, never a difference: nothing overflows or cancels,
and -inf works (secondary chunking, arXiv 2510.26692 section 3, carried down to single tokens).

Shapes: N tiles (chunks x batch x heads, in that order), C tokens of a chunk, K key size, V value
size. "Rows" are the two readers of keys, q and beta k, in turn: [N, C, 2, K].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def to_tiles(x: Tensor, first: int, n: int, chunk_size: int, dtype: torch.dtype) -> Tensor:
    """[B, T, H, ...] -> [n*B*H, C, ...]: ``n`` chunks from chunk ``first`` on, zeros behind T."""
    x = x[:, first * chunk_size : (first + n) * chunk_size]
    missing = n * chunk_size - x.shape[1]
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    x = x.unflatten(1, (n, chunk_size)).movedim(3, 1).movedim(2, 0)
    return x.to(dtype).contiguous().flatten(0, 2)


def from_tiles(tiles: Tensor, out: Tensor, first: int, chunk_size: int) -> None:
    """Writes [n*B*H, C, ...] to its place in ``out`` [B, T, H, ...]: `to_tiles` backwards."""
    batch, _, heads = out.shape[:3]
    x = tiles.unflatten(0, (-1, batch, heads)).movedim(0, 2).movedim(1, 3).flatten(1, 2)
    out = out[:, first * chunk_size : first * chunk_size + x.shape[1]]
    out.copy_(x[:, : out.shape[1]])


class _Level(NamedTuple):
    """Operands of one halving into blocks of 2m tokens, b = C / 2m of them in a tile."""

    row_decay: Tensor  # [N, b, m, 1, K] from the border to the row, for the second halves
    key_decay: Tensor  # [N, b, m, K] from the key to the border, for the first halves
    rows: Tensor  # [N, b, m, 2, K] decayed rows
    keys: Tensor  # [N, b, m, K] decayed keys


@dataclass
class Tiles:
    """A group of chunks, prepared for the recursion over its chunks."""

    q: Tensor  # [N, C, K], scaled
    k: Tensor  # [N, C, K]
    v: Tensor  # [N, C, V]
    beta: Tensor  # [N, C, 1]
    from_start: Tensor  # [N, C, K] decay from the start of the chunk up to each token
    to_end: Tensor  # [N, C, K] decay behind each token until the end of the chunk
    scores: Tensor  # [N, C, 2, C]: q against k up to itself, beta k against earlier k
    inverse: Tensor  # [N, C, C]: (I + scores of beta k)^-1, Eq. 7
    rows: Tensor  # [N, C, 2, K]: q and beta k
    levels: list[_Level]

    @classmethod
    def build(
        cls,
        inputs: tuple[Tensor, ...],
        first: int,
        n: int,
        chunk_size: int,
        scale: float,
        dtype: torch.dtype,
    ) -> Tiles:
        """Chunks ``first`` to ``first + n`` of the operator's q, k, v, g and beta."""
        q, k, v, g, beta = (to_tiles(x, first, n, chunk_size, dtype) for x in inputs)
        q, beta = q * scale, beta.unsqueeze(-1)
        rows = torch.stack((q, beta * k), dim=2)
        scores, prefix, suffix, levels = _decayed_scores(rows, k, g)
        inverse = _unit_lower_inverse(scores[:, :, 1])
        return cls(q, k, v, beta, _exp(prefix), _exp(suffix), scores, inverse, rows, levels)

    @property
    def decay(self) -> Tensor:
        """[N, K, 1]: decay over the whole chunk."""
        return self.from_start[:, -1, :, None]

    def input_grads(
        self, drows: Tensor, dkeys: Tensor, dscores: Tensor, dvalues: Tensor, ddecay: Tensor
    ) -> tuple[Tensor, ...]:
        """Gradients of q, k, v, g, beta, each shaped like its tiles.

        Takes those of the rows decayed from the chunk's start [N, C, 2, K], of the keys decayed to
        its end [N, C, K], of the scores, of beta v [N, C, V] and of the log of `decay` [N, K].
        A row's decay multiplies the row and a key's the key, so the gradient of a log-decay sum is
        ``row * drow`` where it ends and ``-key * dkey`` where it starts.
        """
        drows = drows * self.from_start.unsqueeze(2)
        dkeys = dkeys * self.to_end
        ddecay = ddecay + (self.k * dkeys).sum(1)
        for level in self.levels:
            _add_level_grads(level, dscores, drows, dkeys)
        dsums = (self.rows * drows).sum(2) - self.k * dkeys
        dsums[:, -1] += ddecay
        dg = torch.matmul(torch.ones_like(self.inverse[0]).triu(), dsums)

        dself = dscores[:, :, 0].diagonal(dim1=1, dim2=2).unsqueeze(-1)
        dq, dbeta_k = drows.unbind(2)
        dk = dkeys + self.beta * dbeta_k + dself * self.q
        dq = dq + dself * self.k
        dbeta = (dbeta_k * self.k).sum(-1) + (dvalues * self.v).sum(-1)
        return dq, dk, self.beta * dvalues, dg, dbeta


def _exp(x: Tensor) -> Tensor:
    """exp of x <= 0, with 0 for what is (nearly) subnormal: those take exp 20 times as long."""
    tiny = torch.finfo(x.dtype).tiny
    return F.threshold_(x.clamp(min=int(math.log(tiny))).exp_(), 2 * tiny, 0)


def _halves(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """[N, C, ...] -> first and second halves [N, b, m, ...] of the blocks of 2m tokens."""
    x = x.unflatten(1, (-1, 2, m))
    return x[:, :, 0], x[:, :, 1]


def _diagonal_blocks(x: Tensor, size: int) -> Tensor:
    """[N, C, ..., C] -> view [N, b, size, ..., size] of the blocks on the diagonal."""
    x = x.unflatten(-1, (-1, size)).unflatten(1, (-1, size))
    return x.diagonal(dim1=1, dim2=-2).movedim(-1, 1)


def _decayed_scores(
    rows: Tensor, k: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[_Level]]:
    """Scores [N, C, 2, C], the sums of ``g`` from the chunk's start up to each token and behind it
    to the end, and the operands of each halving, from single tokens up."""
    prefix, suffix = g.clone(), torch.zeros_like(g)
    scores = rows.new_zeros(*rows.shape[:3], rows.shape[1])
    scores[:, :, 0].diagonal(dim1=1, dim2=2).copy_((rows[:, :, 0] * k).sum(-1))
    levels = []
    m = 1
    while m < rows.shape[1]:
        (before, after), behind = _halves(prefix, m), _halves(suffix, m)[0]
        row_decay, key_decay = _exp(after).unsqueeze(3), _exp(behind)
        level = _Level(
            row_decay, key_decay, _halves(rows, m)[1] * row_decay, _halves(k, m)[0] * key_decay
        )
        block = level.rows.flatten(2, 3) @ level.keys.mT
        _diagonal_blocks(scores, 2 * m)[:, :, m:, :, :m].copy_(block.unflatten(2, (m, 2)))
        levels.append(level)
        behind += after[:, :, -1:]
        after += before[:, :, -1:]
        m *= 2
    return scores, prefix, suffix, levels


def _add_level_grads(level: _Level, dscores: Tensor, drows: Tensor, dkeys: Tensor) -> None:
    """Adds the gradients through one halving to ``drows`` [N, C, 2, K] and ``dkeys`` [N, C, K]."""
    m = level.keys.shape[2]
    dblock = _diagonal_blocks(dscores, 2 * m)[:, :, m:, :, :m].flatten(2, 3)
    second = _halves(drows, m)[1]
    second.addcmul_((dblock @ level.keys).unflatten(2, (m, 2)), level.row_decay)
    first = _halves(dkeys, m)[0]
    first.addcmul_(dblock.mT @ level.rows.flatten(2, 3), level.key_decay)


def _unit_lower_inverse(a: Tensor) -> Tensor:
    """(I + a)^-1 for strictly lower triangular ``a`` [N, C, C], by inverting ever larger blocks."""
    inverse = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).repeat(a.shape[0], 1, 1)
    m = 1
    while m < a.shape[-1]:
        block = _diagonal_blocks(inverse, 2 * m)
        corner = _diagonal_blocks(a, 2 * m)[..., m:, :m]
        block[..., m:, :m] = -(block[..., m:, m:] @ corner @ block[..., :m, :m])
        m *= 2
    return inverse
