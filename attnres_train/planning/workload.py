"""What the layers of a model cost a rank on a given device: seconds by what they are spent on, and
bytes, of one micro-batch. Estimates for a search: every figure rests on `planning.devices`.

Shapes: L layers, the embedding in the first, the head in the last; K kinds of work (`WORK`).
"""

from __future__ import annotations

from functools import cache
from math import prod

import numpy as np

from attnres_train.config.schema import RunConfig
from attnres_train.model.flops import head_flops_per_token, layer_flops_per_token
from attnres_train.model.mlp import swiglu_flops_per_token
from attnres_train.optim.kinds import optimizer_kind
from attnres_train.planning.costs import (
    GRADIENT_BYTES,
    PARAMETER_BYTES,
    STREAM_BYTES,
    ModelParameters,
    Parameter,
    activation_bytes,
    read_bytes,
)
from attnres_train.planning.devices import Device
from attnres_train.planning.grids import Grid
from attnres_train.planning.links import Links
from attnres_train.planning.sharding import local_shape
from attnres_train.planning.updates import update_of

WORK = (
    "projections",
    "experts",
    "attention",
    "recurrence",
    "memory",
    "launches",
    "expert exchange",
    "tensor exchange",
    "context exchange",
)
_FORWARD_LAUNCHES, _BACKWARD_LAUNCHES = 110, 220
"""Kernels of a layer of KDA and experts, counted from the code; those of a layer are not fewer on
a rank that has less of it."""
_TRAFFIC = 1.5
"""Times that a kept activation crosses the memory's link in the forward pass: written, and read by
what comes next as far as kernels are not fused (assumed); twice as often in the backward pass."""


class Workload:
    """The layers of ``config``'s model on ``device``, for any grid."""

    def __init__(self, config: RunConfig, device: Device) -> None:
        self.config, self.model, self.device = config, config.model, device
        self.narrow = STREAM_BYTES[config.train.precision]
        self.parameters = ModelParameters(config.model)
        layers = range(config.model.num_layers)
        self.flops = {
            kind: np.array([self._flops(layer)[kind] for layer in layers])
            for kind in ("projections", "experts", "attention", "recurrence", "reads")
        }
        self.moe = np.array([not config.model.is_dense(layer) for layer in layers])
        self.full = np.array([config.model.is_full_attention(layer) for layer in layers])
        self.links = Links(config, device, self.narrow)
        self.kept = cache(self._kept)
        self._times_of = cache(self._times)
        self.held = cache(self._held)

    def tokens(self, grid: Grid) -> int:
        """Of a micro-batch, in a rank's residual stream."""
        length = self.config.train.seq_length
        return grid.micro_batch * length // (grid.tensor * grid.context)

    def times(self, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
        """[L, K] seconds of a forward and of a backward pass of one micro-batch."""
        # Nothing else of a grid counts.
        return self._times_of(grid._replace(data=1, pipeline=1, virtual=1, layout="even"))

    def _flops(self, layer: int) -> dict[str, float]:
        """Forward FLOPs per token by how fast they are done."""
        model, length = self.model, self.config.train.seq_length
        parts = layer_flops_per_token(model, layer, length)
        recurrence = attention = routed = 0.0
        if model.is_full_attention(layer):
            mla = model.mla
            size = mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim
            attention = mla.num_heads * length * size
        else:
            kda = model.kda
            of_head = 6 * kda.head_dim**2 + 3 * kda.chunk_size * kda.head_dim + kda.chunk_size**2
            recurrence = kda.num_heads * of_head
        if not model.is_dense(layer):
            moe = model.moe
            routed = moe.num_experts_per_token * swiglu_flops_per_token(
                model.hidden_size, moe.intermediate_size
            )
        reads = parts.get("depth_reads", 0.0)
        if layer == model.num_layers - 1:
            head = head_flops_per_token(model)
            reads += head.get("depth_reads", 0.0)
            parts = {name: parts.get(name, 0) + head.get(name, 0) for name in parts | head}
        return {
            "projections": sum(parts.values()) - reads - attention - recurrence - routed,
            "experts": routed,
            "attention": attention,
            "recurrence": recurrence,
            "reads": reads,
        }

    def _kept(self, recompute: str) -> np.ndarray:
        """[L] bytes per token that a layer keeps for its backward pass."""
        layers = range(self.model.num_layers)
        return np.array([activation_bytes(self.model, n, self.narrow, recompute) for n in layers])

    def _held(self, tensor: int, expert: int) -> dict[str, np.ndarray]:
        """[L] of a rank: numbers of parameters, of those all that are routed experts', and bytes of
        state and FLOPs of the update if nobody shared them."""
        names = ("elements", "experts", "state", "work")
        rows = [self._sums(of, tensor, expert) for of in self._by_layer()]
        return dict(zip(names, np.array(rows).T, strict=True))

    def _by_layer(self) -> list[tuple[Parameter, ...]]:
        last = self.model.num_layers - 1
        lists = [self.parameters.of_layer(layer) for layer in range(last + 1)]
        lists[0] = self.parameters.embedding + lists[0]
        lists[last] = lists[last] + self.parameters.head
        return lists

    def _sums(self, listed: tuple[Parameter, ...], tensor: int, expert: int) -> tuple[float, ...]:
        optimizer = optimizer_kind(self.config.optimizer)
        has_masters = self.config.train.precision == "bf16_params"
        elements = experts = state = work = 0.0
        for name, shape, rule in listed:
            here = prod(local_shape(shape, rule, tensor, expert))
            elements += here
            experts += here * rule.is_expert
            update = update_of(optimizer, name, shape, rule, has_masters)
            state, work = state + update.state_bytes, work + update.work
        return elements, experts, state, work

    def _times(self, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
        device, tokens = self.device, self.tokens(grid)
        per_flop = {
            "projections": 1 / device.matmul,
            "experts": device.expert_load / device.experts,
            "attention": 1 / device.attention,
            # Beside the values of a context share its transition is computed, as wide.
            "recurrence": (1 + (grid.context > 1)) / device.recurrence,
        }
        forward = np.zeros((len(self.moe), len(WORK)))
        for kind, factor in per_flop.items():
            forward[:, WORK.index(kind)] = self.flops[kind] * tokens * factor / device.peak_flops
        projections = WORK.index("projections")
        forward[:, projections] += (
            self._repeated(grid) * tokens / (device.peak_flops * device.matmul)
        )
        backward = 2 * forward
        bandwidth = device.memory_bandwidth * device.memory_share
        memory, launches = WORK.index("memory"), WORK.index("launches")
        moved = self.kept("none") * tokens
        elements = self.held(grid.tensor, grid.expert)["elements"]
        stored = PARAMETER_BYTES[self.config.train.precision]
        casts = 0 if stored == self.narrow else stored + self.narrow
        forward[:, memory] = _TRAFFIC * moved + (casts + self.narrow) * elements
        # The product that is a weight's gradient is written, read and added to what there is.
        backward[:, memory] = (
            2 * _TRAFFIC * moved + (3 * self.narrow + 2 * GRADIENT_BYTES) * elements
        )
        forward[:, memory] /= bandwidth
        backward[:, memory] /= bandwidth
        backward[:, :launches] += self._again(grid, forward)[:, :launches]
        for passes, count in ((forward, _FORWARD_LAUNCHES), (backward, _BACKWARD_LAUNCHES)):
            host = count * device.launch_seconds
            passes[:, launches] = np.maximum(0, host - passes.sum(1))
        for kind, (there, back) in self.links.exchanges(grid, tokens).items():
            column = WORK.index(f"{kind} exchange")
            forward[:, column], backward[:, column] = there, back
        return forward, backward

    def _repeated(self, grid: Grid) -> np.ndarray:
        """[L] FLOPs per token of the stream of what every rank does for others' tokens too: maps to
        small latents for those of tensor-parallel ranks, keys and values from the latents for those
        of context-parallel ones."""
        model, kda, mla = self.model, self.model.kda, self.model.mla
        latent = mla.kv_lora_rank + mla.qk_rope_head_dim
        small = 2 * model.hidden_size * np.where(self.full, latent, 2 * kda.head_dim)
        expand = 2 * mla.kv_lora_rank * mla.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        return (grid.tensor - 1) * small + (grid.context - 1) * expand * self.full

    def _again(self, grid: Grid, forward: np.ndarray) -> np.ndarray:
        """What the backward pass computes again."""
        if grid.recompute == "full":
            return forward
        again = np.zeros_like(forward)
        if grid.recompute == "selective":
            reads = 2 * read_bytes(self.model, self.narrow) * self.tokens(grid) * _TRAFFIC
            bandwidth = self.device.memory_bandwidth * self.device.memory_share
            again[:, WORK.index("memory")] = reads / bandwidth
        return again
