"""Kimi-Linear, with and without Attention Residuals, once more: one sample, fp64, loops, from the
published equations and the released names alone. Nothing here is shared with the package.

Shapes: T tokens, D hidden size, H heads, K key size per head, V value size per head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

Weights = dict[str, Tensor]


def logits(weights: Weights, config: dict[str, Any], tokens: Tensor) -> Tensor:
    """[T] token ids -> [T, vocabulary]; ``config`` is the released ``config.json``."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    eps, per_block = config["rms_norm_eps"], config.get("attn_res_block_size")
    blocks: list[Tensor] = []
    partial = w["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        layer = below(w, f"model.layers.{i}.")
        for side, norm in (("self_attention", "input"), ("mlp", "post_attention")):
            h = read(layer, f"{side}_res", blocks, partial) if per_block else partial
            if per_block and side == "self_attention" and i % per_block == 0:
                blocks, partial = [*blocks, partial], torch.zeros_like(partial)
            x = rms_norm(h, layer[f"{norm}_layernorm.weight"], eps)
            partial = partial + sublayer(layer, side, i, x, config)
    h = read(below(w, "model."), "output_attn_res", blocks, partial) if per_block else partial
    return rms_norm(h, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


def below(w: Weights, prefix: str) -> Weights:
    return {n.removeprefix(prefix): t for n, t in w.items() if n.startswith(prefix)}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def read(w: Weights, name: str, blocks: list[Tensor], partial: Tensor) -> Tensor:
    """Softmax over blocks and partial of ``query . (weight * source / rms(source))``."""
    sources = torch.stack([*blocks, partial])
    keys = rms_norm(sources, w[f"{name}_norm.weight"], 1e-5)
    scores = keys @ w[f"{name}_proj.weight"][0]
    return (scores.softmax(0).unsqueeze(-1) * sources).sum(0)


def sublayer(layer: Weights, side: str, i: int, x: Tensor, config: dict[str, Any]) -> Tensor:
    if side == "self_attention":
        is_kda = i + 1 in config["linear_attn_config"]["kda_layers"]
        return (kda if is_kda else mla)(below(layer, "self_attn."), x, config)
    if i < config["first_k_dense_replace"]:
        return swiglu(below(layer, "mlp."), x, "gate_proj", "up_proj", "down_proj")
    return experts(below(layer, "block_sparse_moe."), x, config)


def swiglu(w: Weights, x: Tensor, gate: str, up: str, down: str) -> Tensor:
    hidden = silu(x @ w[f"{gate}.weight"].T) * (x @ w[f"{up}.weight"].T)
    return hidden @ w[f"{down}.weight"].T


def experts(w: Weights, x: Tensor, config: dict[str, Any]) -> Tensor:
    y = swiglu(below(w, "shared_experts."), x, "gate_proj", "up_proj", "down_proj")
    scores = (x @ w["gate.weight"].T).sigmoid()
    biased = scores + w["gate.e_score_correction_bias"]
    for t in range(len(x)):
        chosen = biased[t].argsort(descending=True)[: config["num_experts_per_token"]]
        share = config["routed_scaling_factor"] / scores[t, chosen].sum()
        for e in chosen.tolist():
            y[t] += scores[t, e] * share * swiglu(below(w, f"experts.{e}."), x[t], "w1", "w3", "w2")
    return y


def mla(w: Weights, x: Tensor, config: dict[str, Any]) -> Tensor:
    heads, length, latent = config["num_attention_heads"], len(x), config["kv_lora_rank"]
    nope = config["qk_nope_head_dim"]
    q = (x @ w["q_proj.weight"].T).view(length, heads, -1)
    c = x @ w["kv_a_proj_with_mqa.weight"].T
    normed = rms_norm(c[:, :latent], w["kv_a_layernorm.weight"], config["rms_norm_eps"])
    kv = (normed @ w["kv_b_proj.weight"].T).view(length, heads, -1)
    o = []
    for t in range(length):
        scores = torch.einsum("hk,shk->hs", q[t, :, :nope], kv[: t + 1, :, :nope])
        scores = scores + q[t, :, nope:] @ c[: t + 1, latent:].T
        weights = (scores * q.shape[-1] ** -0.5).softmax(-1)
        o.append(torch.einsum("hs,shv->hv", weights, kv[: t + 1, :, nope:]).flatten())
    return torch.stack(o) @ w["o_proj.weight"].T


def kda(w: Weights, x: Tensor, config: dict[str, Any]) -> Tensor:
    linear = config["linear_attn_config"]
    heads, size, length = linear["num_heads"], linear["head_dim"], len(x)
    q, k, v = (short_conv(x @ w[f"{n}_proj.weight"].T, w[f"{n}_conv1d.weight"]) for n in "qkv")
    q, k, v = (z.view(length, heads, size) for z in (q, k, v))
    q, k = (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
    q = q * size**-0.5
    a = x @ w["f_a_proj.weight"].T @ w["f_b_proj.weight"].T + w["dt_bias"]
    g = -w["A_log"].reshape(heads, 1).exp() * softplus(a.view(length, heads, size))
    beta = (x @ w["b_proj.weight"].T).sigmoid()
    gate = (x @ w["g_a_proj.weight"].T @ w["g_b_proj.weight"].T).view(length, heads, size)
    state, outputs = x.new_zeros(heads, size, size), []  # [H, K, V]
    for t in range(length):
        state = g[t].exp().unsqueeze(-1) * state
        seen = torch.einsum("hkv,hk->hv", state, k[t])
        update = beta[t].unsqueeze(-1) * (v[t] - seen)
        state = state + k[t].unsqueeze(-1) * update.unsqueeze(-2)
        o = torch.einsum("hkv,hk->hv", state, q[t])
        o = rms_norm(o, w["o_norm.weight"], config["rms_norm_eps"]) * gate[t].sigmoid()
        outputs.append(o.flatten())
    return torch.stack(outputs) @ w["o_proj.weight"].T


def short_conv(x: Tensor, weight: Tensor) -> Tensor:
    taps = weight.shape[-1]
    padded = torch.cat([x.new_zeros(taps - 1, x.shape[1]), x])
    return silu(sum(weight[:, 0, j] * padded[j : j + len(x)] for j in range(taps)))
