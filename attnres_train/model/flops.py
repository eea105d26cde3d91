"""FLOPs of the model, for throughput against the device's peak (MFU) and for planning.

A multiply-add is two FLOPs. Counted are matmuls, attention, KDA's convolutions and recurrence and
the depth reads; norms, activations and the router's sort are not. What a module costs stands beside
the module.
"""

from __future__ import annotations

from attnres_train.config.model_schema import ModelConfig
from attnres_train.model.batch import MicroBatch
from attnres_train.model.kda.layer import kda_flops_per_token
from attnres_train.model.mla import document_lengths, mla_flops_per_token
from attnres_train.model.mlp import swiglu_flops_per_token
from attnres_train.model.moe.layer import moe_flops_per_token
from attnres_train.model.norm import gate_flops_per_token
from attnres_train.model.residual.kind import residual_kind
from attnres_train.model.shares import Shares


def layer_flops_per_token(config: ModelConfig, layer: int, seq_length: float) -> dict[str, float]:
    """Forward FLOPs per token of decoder layer ``layer`` (0-based), by part: ``kda`` or ``mla``,
    ``dense`` or ``moe``, ``depth_reads`` and ``norm_gates``."""
    hidden = config.hidden_size
    if config.is_full_attention(layer):
        parts = {"mla": mla_flops_per_token(hidden, config.mla, seq_length)}
    else:
        parts = {"kda": kda_flops_per_token(hidden, config.kda)}
    if config.is_dense(layer):
        parts["dense"] = swiglu_flops_per_token(hidden, config.intermediate_size)
    else:
        parts["moe"] = moe_flops_per_token(hidden, config.moe)
    return parts | _reads(config, 2 * layer + 1, 2 * layer + 2)


def head_flops_per_token(config: ModelConfig) -> dict[str, float]:
    """Forward FLOPs per token after the last layer: ``head``, the output projection, and
    ``depth_reads`` and ``norm_gates``, the read of the whole stream before it."""
    parts = {"head": 2.0 * config.hidden_size * config.vocab_size}
    return parts | _reads(config, config.num_sublayers + 1)


def recomputed_flops(parts: dict[str, float], recompute: str) -> float:
    """FLOPs of a layer's ``parts`` that its backward pass runs again under `train.recompute`."""
    if recompute == "selective":
        return parts.get("depth_reads", 0.0) + parts.get("norm_gates", 0.0)
    return sum(parts.values()) if recompute == "full" else 0.0


def layer_costs(config: ModelConfig, seq_length: int, recompute: str) -> list[float]:
    """FLOPs per token of each decoder layer in training, for balancing: forward, a backward of
    twice its cost and what that recomputes. The head's are in the last layer's; the embedding, a
    table, has none."""
    costs = []
    for layer in range(config.num_layers):
        parts = layer_flops_per_token(config, layer, seq_length)
        costs.append(3 * sum(parts.values()) + recomputed_flops(parts, recompute))
    costs[-1] += 3 * sum(head_flops_per_token(config).values())
    return costs


def forward_flops_per_token(config: ModelConfig, seq_length: float) -> dict[str, float]:
    """Forward FLOPs per token of the whole model, by part."""
    total = head_flops_per_token(config)
    for layer in range(config.num_layers):
        for part, flops in layer_flops_per_token(config, layer, seq_length).items():
            total[part] = total.get(part, 0.0) + flops
    return total


def training_flops_per_token(config: ModelConfig, seq_length: float) -> float:
    """FLOPs per trained token: forward and a backward of twice its cost. Recomputation is not
    counted, so that MFU measures useful work. For packed documents ``seq_length`` is their
    `mean_document_length`."""
    return 3 * sum(forward_flops_per_token(config, seq_length).values())


def mean_document_length(batch: MicroBatch, shares: Shares | None = None) -> float:
    """Tokens of a token's document, averaged over the tokens of the samples of ``batch``, of which
    it has ``shares`` (default: all). Documents of n tokens have sum(n^2) / sum(n), since attention
    costs each of their tokens as much as n."""
    samples, here = batch.tokens.shape
    length = here * shares.count // len(shares.own) if shares else here
    if batch.cu_seqlens is None:
        return length
    lengths = document_lengths(batch.cu_seqlens, samples, length)
    return sum(n * n for n in lengths) / sum(lengths)


def _reads(config: ModelConfig, *sublayers: int) -> dict[str, float]:
    """What ``sublayers`` read from the stream and write to it, but for the standard sum; and the
    gates on the norms of what they read."""
    flops, rank = sum(map(residual_kind(config).flops, sublayers)), config.residual.norm_gate_rank
    parts = {"depth_reads": flops} if flops else {}
    if rank is not None:
        parts["norm_gates"] = len(sublayers) * gate_flops_per_token(config.hidden_size, rank)
    return parts
