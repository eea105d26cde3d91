"""What model chunks cost: parameters, FLOPs, bytes. For planning; nothing is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from attnres_train.config.model_schema import KDAConfig, MLAConfig, ModelConfig, MoEConfig
from attnres_train.config.schema import RunConfig
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.flops import depth_read_flops, layer_flops_per_token
from attnres_train.model.layer import DecoderLayer
from attnres_train.optim.groups import assign

PARAMETER_BYTES = {"fp32": 4, "bf16": 4, "bf16_params": 2}
STREAM_BYTES = {"fp32": 4, "bf16": 2, "bf16_params": 2}
_FP32 = 4


@dataclass(frozen=True)
class ChunkCosts:
    """One chunk. FLOPs and activations are per micro-batch; a unit is one [B, T, D] tensor."""

    parameters: int
    optimizer_bytes: int
    """State of Muon and AdamW, and fp32 masters."""
    forward_flops: float
    backward_flops: float
    """Twice the forward pass, and a forward pass again where activations are recomputed."""
    activation_bytes: float
    """Kept from forward to backward pass, besides the blocks (an estimate)."""
    recompute_bytes: float
    """Extra while the backward pass reruns a layer (an estimate)."""


class _Parameters(NamedTuple):
    count: int
    optimizer_bytes: int


class CostModel:
    """Costs of the chunks of ``config``'s model."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.model = config, config.model
        self.tokens = config.train.micro_batch_size * config.train.seq_length
        self.unit_bytes = self.tokens * self.model.hidden_size * self.stream_bytes
        self._layers: dict[tuple[bool, bool], _Parameters] = {}
        end = self.model.num_layers
        self._embedding = self._parameters(ModelChunk(self.model, 0, 0, device="meta"))
        self._head = self._parameters(ModelChunk(self.model, end, end, device="meta"))

    @property
    def stream_bytes(self) -> int:
        """Bytes of a number in blocks, partials and matmul inputs."""
        return STREAM_BYTES[self.config.train.precision]

    def chunk(self, layers: range) -> ChunkCosts:
        """The chunk of decoder layers ``layers``, with embedding and head where it has them."""
        model, tokens = self.model, self.tokens
        parts = [self._layer_parameters(layer) for layer in layers]
        length = self.config.train.seq_length
        flops = sum(sum(layer_flops_per_token(model, i, length).values()) for i in layers)
        kept = [activation_bytes(model, layer, self.stream_bytes) for layer in layers]
        held, rerun = sum(kept), 0.0
        recompute = self.config.train.recompute == "full"
        if recompute:
            held, rerun = len(layers) * model.hidden_size * self.stream_bytes, max(kept)
        backward = (3 if recompute else 2) * flops
        head_bytes = 0
        if layers.start == 0:
            parts.append(self._embedding)
        if layers.stop == model.num_layers:
            parts.append(self._head)
            sources = -(-model.num_sublayers // model.block_size) + 1 if model.block_size else 0
            head = 2 * model.hidden_size * model.vocab_size + depth_read_flops(model, sources)
            flops, backward = flops + head, backward + 2 * head
            # The fused loss makes the head's gradient, one weight-sized tensor, in its forward.
            head_bytes = model.hidden_size * model.vocab_size * self.stream_bytes
        return ChunkCosts(
            parameters=sum(part.count for part in parts),
            optimizer_bytes=sum(part.optimizer_bytes for part in parts),
            forward_flops=flops * tokens,
            backward_flops=backward * tokens,
            activation_bytes=held * tokens + head_bytes,
            recompute_bytes=rerun * tokens,
        )

    def _layer_parameters(self, layer: int) -> _Parameters:
        kind = (self.model.is_full_attention(layer), self.model.is_dense(layer))
        if kind not in self._layers:
            with torch.device("meta"):
                self._layers[kind] = self._parameters(DecoderLayer(self.model, layer))
        return self._layers[kind]

    def _parameters(self, module: nn.Module) -> _Parameters:
        count = optimizer_bytes = 0
        masters = _FP32 if self.config.train.precision == "bf16_params" else 0
        for name, parameter in module.named_parameters():
            rule = assign(name, parameter, self.config.optimizer.kind)
            states = 1 if rule.kind == "muon" else 2  # momentum; first and second moment
            count += parameter.numel()
            optimizer_bytes += (states * _FP32 + masters) * parameter.numel()
        return _Parameters(count, optimizer_bytes)


def activation_bytes(model: ModelConfig, layer: int, narrow: int) -> float:
    """Bytes per token that decoder layer ``layer`` keeps for its backward pass: an estimate from
    the tensors that its modules save, ``narrow`` bytes a number except where fp32 is kept.

    Not counted: blocks (the store has them) and tensors of a few numbers per head or token.
    """
    hidden = model.hidden_size
    stream = 2 * 3 * hidden * narrow  # per sublayer: what was read, its norm's input, the partial
    attention = (
        _mla_bytes(hidden, model.mla, narrow)
        if model.is_full_attention(layer)
        else _kda_bytes(hidden, model.kda, narrow)
    )
    if model.is_dense(layer):
        mlp = (hidden + 4 * model.intermediate_size) * narrow
    else:
        mlp = _moe_bytes(hidden, model.moe, narrow)
    return stream + attention + mlp


def _kda_bytes(hidden: int, kda: KDAConfig, narrow: int) -> float:
    """Convolutions and projections narrow; norms of q and k, decay, recurrence in fp32."""
    width = kda.num_heads * kda.head_dim
    states = width * kda.head_dim / kda.chunk_size
    return (hidden + 8 * width + 2 * kda.head_dim) * narrow + (8 * width + states) * _FP32


def _mla_bytes(hidden: int, mla: MLAConfig, narrow: int) -> float:
    """Query, key, value and output (padded to the key's size on CPU), output in row order, latent
    before and behind its norm."""
    key = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    latent = 2 * mla.kv_lora_rank + mla.qk_rope_head_dim
    heads = mla.num_heads * (4 * key + mla.v_head_dim)
    return (hidden + heads + latent) * narrow + mla.kv_lora_rank * _FP32


def _moe_bytes(hidden: int, moe: MoEConfig, narrow: int) -> float:
    """Each chosen expert's row and five hidden tensors, the shared experts' four, the router."""
    chosen = moe.num_experts_per_token * (hidden + 5 * moe.intermediate_size)
    shared = 4 * moe.num_shared_experts * moe.intermediate_size
    router = moe.num_experts + (hidden if narrow < _FP32 else 0)
    return (hidden + chosen + shared) * narrow + router * _FP32
