"""KDA one token at a time, written from the paper's recurrence (arXiv 2510.26692, Eq. 1) and the
released layer's description, in plain torch: the oracle of the KDA tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def recurrence(q, k, v, g, beta, state=None, scale=None) -> tuple[Tensor, Tensor]:
    """S_t = (I - beta k k^T) diag(exp g) S_{t-1} + beta k v^T, o_t = S_t^T (scale q), literally."""
    batch, length, heads, size = k.shape
    scale = size**-0.5 if scale is None else scale
    eye = torch.eye(size, dtype=k.dtype)
    if state is None:
        state = torch.zeros(batch, heads, size, v.shape[-1], dtype=k.dtype)
    outputs = []
    for t in range(length):
        key, b = k[:, t, :, :, None], beta[:, t, :, None, None]
        decayed = torch.diag_embed(g[:, t].exp()) @ state
        state = (eye - b * key @ key.mT) @ decayed + b * key @ v[:, t, :, None, :]
        outputs.append((state.mT @ (scale * q[:, t, :, :, None])).squeeze(-1))
    return torch.stack(outputs, 1), state


def log_decay(a: Tensor, rate: Tensor, lower_bound: float | None) -> Tensor:
    """Both gates of ``a`` (with its bias) by their formulas; ``rate`` is exp(A_log)."""
    if lower_bound is None:
        return -rate * torch.log1p(torch.exp(a))
    return lower_bound / (1 + torch.exp(-rate * a))


def layer(
    weights: dict[str, Tensor],
    x: Tensor,
    heads: int,
    eps: float,
    lower_bound: float | None = None,
) -> Tensor:
    """The KDA sublayer of one document ``x`` [T, D], token by token and head by head."""
    length, size = x.shape[0], weights["o_norm.weight"].shape[0]

    def conv(name: str) -> Tensor:
        z, w = x @ weights[f"{name}_proj.weight"].T, weights[f"{name}_conv1d.weight"][:, 0]
        padded = torch.cat((z.new_zeros(w.shape[1] - 1, z.shape[1]), z))
        y = torch.stack([(padded[t : t + w.shape[1]] * w.T).sum(0) for t in range(length)])
        return (y / (1 + torch.exp(-y))).view(length, heads, size)

    def unit(z: Tensor) -> Tensor:
        return z / torch.sqrt((z * z).sum(-1, keepdim=True) + 1e-6)

    q, k, v = unit(conv("q")), unit(conv("k")), conv("v")
    a = x @ weights["f_a_proj.weight"].T @ weights["f_b_proj.weight"].T + weights["dt_bias"]
    rate = torch.exp(weights["A_log"].view(heads, 1))
    g = log_decay(a.view(length, heads, size), rate, lower_bound)
    beta = 1 / (1 + torch.exp(-(x @ weights["b_proj.weight"].T)))
    o = recurrence(*(z.unsqueeze(0) for z in (q, k, v, g, beta)))[0][0]
    o = o / torch.sqrt((o * o).mean(-1, keepdim=True) + eps) * weights["o_norm.weight"]
    z = x @ weights["g_a_proj.weight"].T @ weights["g_b_proj.weight"].T
    o = o / (1 + torch.exp(-z.view(length, heads, size)))
    return o.reshape(length, -1) @ weights["o_proj.weight"].T


def random_inputs(
    batch: int, length: int, heads: int, key_size: int, value_size: int, log_decay: str | float
) -> list[Tensor]:
    """Seeded fp64 q, k, v, g, beta. ``log_decay``: every step's, or "mixed": from -1e-3 to -100 per
    channel and token, or "channels": per channel only."""
    rng = torch.Generator().manual_seed(batch * 1000 + length)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def strengths(*shape: int) -> Tensor:
        low, high = math.log(1e-3), math.log(100)
        return -torch.exp(
            low + (high - low) * torch.rand(*shape, generator=rng, dtype=torch.float64)
        )

    shape = (batch, length, heads, key_size)
    q, k = (nn.functional.normalize(randn(*shape), dim=-1) for _ in range(2))
    v = randn(batch, length, heads, value_size)
    if log_decay == "mixed":
        g = strengths(*shape)
    elif log_decay == "channels":
        g = strengths(heads, key_size).expand(shape).clone()
    else:
        g = torch.full(shape, float(log_decay), dtype=torch.float64)
    beta = torch.rand(batch, length, heads, generator=rng, dtype=torch.float64)
    return [q, k, v, g, beta]
