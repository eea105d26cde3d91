"""NoPE multi-head latent attention (Kimi Linear, arXiv 2510.26692; no rotary embedding).

Shapes: B batch, T tokens, S those in the stream, D hidden size, H heads here, R latent size, N key
size expanded from the latent, E key size shared by all heads, V value size per head. Where some of
a sample's tokens are here (`model.shares`), T counts those, and T' all of the sample up to the last
of them.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from attnres_train.config.model_schema import MLAConfig
from attnres_train.model.latent import latent_attention
from attnres_train.model.norm import RMSNorm
from attnres_train.model.parameters import ParameterRule, matrices
from attnres_train.model.ports import Past, SequenceExchange, WholeSamples
from attnres_train.model.shares import Shares
from attnres_train.model.split import TensorSplit, Whole


class MultiHeadLatentAttention(nn.Module):
    """Causal softmax attention whose keys and values are expanded from a normalised latent.

    The ``E`` key dims that all heads share are neither normalised nor rotated, but they stay in
    the score and in its scale ``(N + E) ** -0.5``. Parameter names are those of the released
    checkpoint. Heads are split by ``split`` (default: all are here); every rank has the latent.
    ``sequence`` is the port to the rest of the samples (default: they are whole).
    """

    def __init__(
        self,
        hidden_size: int,
        config: MLAConfig,
        split: TensorSplit | None = None,
        sequence: SequenceExchange | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.split = split = split or Whole()
        self.sequence = sequence or WholeSamples()
        self.heads = len(split.share(config.num_heads))
        heads, latent = config.num_heads, config.kv_lora_rank
        nope, shared, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.q_proj = split.column(hidden_size, heads * (nope + shared))
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, latent + shared, bias=False)
        self.kv_a_layernorm = RMSNorm(latent, config.kv_norm_eps)
        self.kv_b_proj = split.column(latent, heads * (nope + value))
        self.o_proj = split.row(heads * value, hidden_size)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None = None, past: Past | None = None
    ) -> Tensor:
        """[B, S, D] -> [B, S, D]; ``cu_seqlens`` as in `MicroBatch` keeps documents apart.
        ``past`` (not with documents): what the tokens go on from, and are attended with."""
        c = self.config
        x = self.split.gather(x)
        batch, length, _ = x.shape
        per_head = (batch, length, self.heads, -1)
        q = self.q_proj(x).view(per_head)
        # "rope" is their released name. Nothing rotates them: KDA tells positions apart.
        latent, shared = self.kv_a_proj_with_mqa(x).split(
            [c.kv_lora_rank, c.qk_rope_head_dim], dim=-1
        )
        # Of the tokens elsewhere the latent is asked for, far less than the heads made of it. After
        # its norm, which every token has once then; in the dtype of the matmul that takes it.
        sequence: SequenceExchange = past or self.sequence
        latent, shared = sequence.gather([self.kv_a_layernorm(latent).to(shared), shared])
        if past is not None:
            weight = self.kv_b_proj.get_parameter("weight").unflatten(0, (self.heads, -1))
            o = latent_attention(q, latent, shared, weight, past.begins)
            return self.split.scatter(self.o_proj(o.reshape(batch, length, -1)))
        kv = self.kv_b_proj(latent).unflatten(-1, (self.heads, -1))
        nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        k = torch.cat([nope, shared.unsqueeze(2).expand(-1, -1, self.heads, -1)], dim=-1)
        o = causal_attention(q, k, v, cu_seqlens, self.sequence.shares)
        return self.split.scatter(self.o_proj(o.reshape(batch, length, -1)))

    def parameter_rules(self, std: float) -> dict[str, ParameterRule]:
        heads = self.heads
        rules = matrices(std, ["q_proj.weight"], heads=heads, split=0)
        rules |= matrices(std, ["kv_a_proj_with_mqa.weight"], role="low_rank")
        rules |= matrices(std, ["kv_b_proj.weight"], role="low_rank", heads=heads, split=0)
        return rules | matrices(std, ["o_proj.weight"], split=1)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, shares: Shares | None = None
) -> Tensor:
    """Causal attention within documents; q [B, T, H, N+E], k [B, T', H, N+E], v [B, T', H, V] ->
    [B, T, H, V]. ``shares`` says which tokens of the samples the queries are (default: all).

    Packed documents are attended one by one: that costs what they cost alone and needs no [T, T]
    mask. On a GPU it waits for ``cu_seqlens``, since every document is a launch of its own.
    """
    shares = shares or Shares()
    value_size, padding = v.shape[-1], q.shape[-1] - v.shape[-1]
    if padding > 0 and v.device.type == "cpu":
        v = F.pad(v, (0, padding))  # torch's fused CPU kernel wants keys and values of one size
    if cu_seqlens is None:
        size = q.shape[1] // len(shares.own)
        ends = [(share + 1) * size for share in shares.own]
        parts = [
            _attend(queries, k[:, :end], v[:, :end])
            for queries, end in zip(q.split(size, dim=1), ends, strict=True)
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))[..., :value_size]
    spans = list(shares.spans(cu_seqlens, *q.shape[:2]))
    documents = q.flatten(0, 1).unsqueeze(0).split([span.tokens for span in spans], dim=1)
    o = torch.cat(
        [
            _attend(queries, *(x[s.sample, s.start : s.end].unsqueeze(0) for x in (k, v)))
            for queries, s in zip(documents, spans, strict=True)
        ],
        dim=1,
    )
    return o.view(*q.shape[:3], -1)[..., :value_size]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The queries are those of the last keys."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    same = q.shape[2] == k.shape[2]
    mask = None if same else causal_lower_right(q.shape[2], k.shape[2])
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=same, scale=q.shape[-1] ** -0.5
    )
    return o.transpose(1, 2)


def document_lengths(cu_seqlens: Tensor, batch: int, length: int) -> list[int]:
    """Tokens of each document of a micro-batch [``batch``, ``length``], in order, without empty
    ones. ``cu_seqlens`` as in `MicroBatch`: the end of a sample ends a document too."""
    borders = {*cu_seqlens.tolist(), *range(0, batch * length + 1, length)}
    return [end - start for start, end in pairwise(sorted(borders))]


def mla_flops_per_token(hidden_size: int, config: MLAConfig, seq_length: float) -> float:
    """Forward FLOPs per token, exact for causal attention: in a document of ``seq_length`` a token
    sees half of it on average."""
    heads, latent = config.num_heads, config.kv_lora_rank
    key, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    weights = hidden_size * (heads * key + latent + config.qk_rope_head_dim)
    weights += latent * heads * (config.qk_nope_head_dim + value) + heads * value * hidden_size
    return 2 * weights + heads * seq_length * (key + value)
