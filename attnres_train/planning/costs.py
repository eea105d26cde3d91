"""What model chunks cost: parameters, FLOPs, bytes. For planning; nothing is allocated."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch

from attnres_train.config.model_schema import KDAConfig, MLAConfig, ModelConfig, MoEConfig
from attnres_train.config.schema import RunConfig
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.flops import (
    head_flops_per_token,
    layer_flops_per_token,
    recomputed_flops,
)
from attnres_train.model.layer import DecoderLayer
from attnres_train.model.parameters import ParameterRule, parameter_rules
from attnres_train.model.residual.kind import residual_kind
from attnres_train.optim.kinds import optimizer_kind
from attnres_train.parallel.ownership import Update
from attnres_train.planning.experts import exchange_bytes, stream_tokens
from attnres_train.planning.sharding import local_shape
from attnres_train.planning.updates import update_of

PARAMETER_BYTES = {"fp32": 4, "bf16": 4, "bf16_params": 2}
GRADIENT_BYTES = 4
STREAM_BYTES = {"fp32": 4, "bf16": 2, "bf16_params": 2}
_FP32 = 4


@dataclass(frozen=True)
class ChunkCosts:
    """One chunk on one rank. FLOPs and activations are per micro-batch; a unit is one [B, T, D]
    tensor. Load of the experts is even."""

    parameters: int
    updates: tuple[Update, ...]
    """Of each of its parameters that all ranks of a stage have whole."""
    split_updates: tuple[Update, ...]
    """Of this rank's part of each parameter that tensor-parallel ranks share."""
    expert_updates: tuple[Update, ...]
    """Of each stack of the experts that are here."""
    forward_flops: float
    backward_flops: float
    """Twice the forward pass, and what activation recomputation runs again."""
    activation_bytes: float
    """Kept from forward to backward pass, besides the blocks (an estimate)."""
    recompute_bytes: float
    """Extra at a time for what the backward pass recomputes (an estimate)."""
    forward_exchange: float
    """Bytes to the other ranks that share the experts, as those of the backward pass."""
    backward_exchange: float

    @property
    def optimizer_bytes(self) -> int:
        """State of the optimizer and fp32 masters, of all owners together."""
        together = (*self.updates, *self.split_updates, *self.expert_updates)
        return sum(update.state_bytes for update in together)


class Parameter(NamedTuple):
    name: str
    shape: tuple[int, ...]
    rule: ParameterRule


class _Parameters(NamedTuple):
    elements: int
    updates: tuple[Update, ...]
    split_updates: tuple[Update, ...]
    expert_updates: tuple[Update, ...]


class CostModel:
    """Costs of the chunks of ``config``'s model, on one of the ranks that share its tokens."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.model = config, config.model
        self.tokens = stream_tokens(config)
        self.exchange = exchange_bytes(config, self.stream_bytes)
        self.unit_bytes = self.tokens * self.model.stream_size * self.stream_bytes
        self.parameters = ModelParameters(self.model)
        self._summed: dict[Hashable, _Parameters] = {}

    @property
    def stream_bytes(self) -> int:
        """Bytes of a number in blocks, partials and matmul inputs."""
        return STREAM_BYTES[self.config.train.precision]

    def chunk(self, layers: range) -> ChunkCosts:
        """The chunk of decoder layers ``layers``, with embedding and head where it has them."""
        model, train, tokens = self.model, self.config.train, self.tokens
        parts = [self._sum(self.parameters.of_layer(layer)) for layer in layers]
        by_part = [layer_flops_per_token(model, layer, train.seq_length) for layer in layers]
        flops = sum(sum(of_layer.values()) for of_layer in by_part)
        backward = 2 * flops + sum(recomputed_flops(of, train.recompute) for of in by_part)
        kept = sum(
            activation_bytes(model, layer, self.stream_bytes, train.recompute) for layer in layers
        )
        experts = sum(not model.is_dense(layer) for layer in layers)
        head_bytes = 0
        if layers.start == 0:
            parts.append(self._sum(self.parameters.embedding))
        if layers.stop == model.num_layers:
            parts.append(self._sum(self.parameters.head))
            head = sum(head_flops_per_token(model).values())
            flops, backward = flops + head, backward + 2 * head
            # The fused loss makes the head's gradient, one weight-sized tensor, in its forward.
            head_bytes = model.hidden_size * model.vocab_size * self.stream_bytes
            head_bytes //= self.config.parallel.tensor_model_parallel_size
        return ChunkCosts(
            parameters=sum(part.elements for part in parts),
            updates=tuple(update for part in parts for update in part.updates),
            split_updates=tuple(update for part in parts for update in part.split_updates),
            expert_updates=tuple(update for part in parts for update in part.expert_updates),
            forward_flops=flops * tokens,
            backward_flops=backward * tokens,
            activation_bytes=kept * tokens + head_bytes,
            recompute_bytes=self._rerun_bytes(layers) * tokens,
            forward_exchange=experts * self.exchange.forward,
            backward_exchange=experts * self.exchange.backward,
        )

    def _rerun_bytes(self, layers: range) -> float:
        """Bytes per token that a recomputation makes at a time: a layer's activations, or one read
        and phase 1 of all reads of a block."""
        model, narrow = self.model, self.stream_bytes
        if self.config.train.recompute == "none":
            return 0.0
        if self.config.train.recompute == "full":
            return max(activation_bytes(model, layer, narrow) for layer in layers)
        together = min(model.block_size or 0, 2 * len(layers))
        return read_bytes(model, narrow) + together * model.hidden_size * narrow

    def _sum(self, parameters: tuple[Parameter, ...]) -> _Parameters:
        if parameters not in self._summed:
            self._summed[parameters] = self._local(parameters)
        return self._summed[parameters]

    def _local(self, parameters: tuple[Parameter, ...]) -> _Parameters:
        optimizer = optimizer_kind(self.config.optimizer)
        tensor = self.config.parallel.tensor_model_parallel_size
        has_masters = self.config.train.precision == "bf16_params"
        elements = 0
        whole: list[Update] = []
        split: list[Update] = []
        of_experts: list[Update] = []
        for name, shape, rule in parameters:
            here = local_shape(shape, rule, tensor, self.exchange.ranks)
            is_split = tensor > 1 and rule.split is not None
            if is_split:
                rule = replace(rule, heads=rule.heads // tensor)
            update = update_of(optimizer, name, here, rule, has_masters, tensor)
            (of_experts if rule.is_expert else split if is_split else whole).append(update)
            elements += prod(here)
        return _Parameters(elements, tuple(whole), tuple(split), tuple(of_experts))


class ModelParameters:
    """Every parameter of ``model``, from modules on the meta device: nothing is allocated."""

    def __init__(self, model: ModelConfig) -> None:
        self._model, end = model, model.num_layers
        self._layers: dict[Hashable, tuple[Parameter, ...]] = {}
        self.embedding = _listed(ModelChunk(model, 0, 0, device="meta"))
        self.head = _listed(ModelChunk(model, end, end, device="meta"))

    def of_layer(self, layer: int) -> tuple[Parameter, ...]:
        """Those of decoder layer ``layer``; the same object for layers of one kind."""
        model, residual = self._model, residual_kind(self._model)
        reads = (residual.learned(2 * layer + 1), residual.learned(2 * layer + 2))
        shapes = tuple((name, learned.shape) for of in reads for name, learned in of.items())
        like = (model.is_full_attention(layer), model.is_dense(layer), shapes)
        if like not in self._layers:
            with torch.device("meta"):
                self._layers[like] = _listed(DecoderLayer(model, layer))
        return self._layers[like]


def _listed(module: ModelChunk | DecoderLayer) -> tuple[Parameter, ...]:
    rules = parameter_rules(module)
    named = module.named_parameters()
    return tuple(Parameter(name, tuple(one.shape), rules[name]) for name, one in named)


def activation_bytes(model: ModelConfig, layer: int, narrow: int, recompute: str = "none") -> float:
    """Bytes per token that decoder layer ``layer`` keeps for its backward pass: an estimate from
    the tensors that its modules save, ``narrow`` bytes a number except where fp32 is kept.

    Not counted: blocks (the store has them) and tensors of a few numbers per head or token.
    """
    hidden = model.hidden_size
    partial = model.stream_size * model.residual_kind.partial_units * narrow
    if recompute == "full":
        return partial  # the one before it
    stream: float = 2 * partial  # the one at each sublayer
    if recompute == "none":
        stream += 2 * read_bytes(model, narrow)
    attention = (
        _mla_bytes(hidden, model.mla, narrow)
        if model.is_full_attention(layer)
        else _kda_bytes(hidden, model.kda, narrow)
    )
    mlp: float
    if model.is_dense(layer):
        mlp = (hidden + 4 * model.intermediate_size) * narrow
    else:
        mlp = _moe_bytes(hidden, model.moe, narrow)
    return stream + attention + mlp


def read_bytes(model: ModelConfig, narrow: int) -> float:
    """Bytes per token of one sublayer's read: what was read, the norm's input in fp32 if that is a
    copy, the norm's output before its weight, and what it is gated with. (After weight and gate it
    is the sublayer's.)"""
    own = (2 * narrow + (_FP32 if narrow < _FP32 else 0)) * model.hidden_size
    rank = model.residual.norm_gate_rank
    return own if rank is None else own + 2 * narrow * (model.hidden_size + rank)


def _kda_bytes(hidden: int, kda: KDAConfig, narrow: int) -> float:
    """Convolutions and projections narrow; norms of q and k, decay, recurrence in fp32."""
    width = kda.num_heads * kda.head_dim
    states = width * kda.head_dim / kda.chunk_size
    return (hidden + 8 * width + 2 * kda.head_dim) * narrow + (8 * width + states) * _FP32


def _mla_bytes(hidden: int, mla: MLAConfig, narrow: int) -> float:
    """Query, key, value and output (padded to the key's size on CPU), output in row order, latent
    before and after its norm."""
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
