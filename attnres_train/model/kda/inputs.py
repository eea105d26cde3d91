"""What KDA takes per token, and how a layer's projections become it.

Shapes: B batch, T tokens, H heads, K key size, V value size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_L2_EPS = 1e-6  # inside the sum of squares, as in the released code


class KDAInputs(NamedTuple):
    """The tensors of `chunk_kda`, or the raw ones that a `DecayGate` makes them of."""

    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, H, V]
    g: Tensor  # [B, T, H, K]
    beta: Tensor  # [B, T, H]

    @property
    def compute_dtype(self) -> torch.dtype:
        """fp32, or fp64 if one of them is."""
        wide = any(x.dtype == torch.float64 for x in self)
        return torch.float64 if wide else torch.float32


class DecayGate(NamedTuple):
    """A KDA layer's gate, in one of two forms."""

    A_log: Tensor  # [1, 1, H, 1]
    dt_bias: Tensor  # [H K]
    lower_bound: float | None

    def activate(self, raw: KDAInputs) -> KDAInputs:
        """L2 norms of q and k, the `log_decay` of g, the sigmoid of beta; v as it is."""
        g, beta = self.log_decay(raw.g), raw.beta.to(self.A_log.dtype).sigmoid()
        return KDAInputs(_l2_norm(raw.q), _l2_norm(raw.k), raw.v, g, beta)

    def log_decay(self, a: Tensor) -> Tensor:
        """Log of the decay per key channel, below 0, of ``a`` [B, T, H, K]; in A_log's dtype.

        It is ``-exp(A_log) softplus(a + dt_bias)`` without a lower bound, and
        ``lower_bound sigmoid(exp(A_log) (a + dt_bias))`` with it.
        """
        a = a.to(self.A_log.dtype) + self.dt_bias.view(a.shape[-2:])
        if self.lower_bound is None:
            return -self.A_log.exp() * F.softplus(a)
        return self.lower_bound * torch.sigmoid(self.A_log.exp() * a)


def _l2_norm(x: Tensor) -> Tensor:
    """x / |x| over the last dimension, in fp32 (fp64 stays fp64)."""
    # Keys longer than 1 let the correction by beta k k^T overshoot, and the state may grow.
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * (x.square().sum(-1, keepdim=True) + _L2_EPS).rsqrt()
