"""What the groups of a grid send, and how long that takes on a device's links.

Ranks are laid out as `parallel.megatron` has it: tensor, context, expert, data, pipeline, the first
varying fastest. A group whose ranks share a node sends through its links; one that spans
nodes through the network, of which each of its ranks on a node has its own port.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from attnres_train.config.schema import RunConfig
from attnres_train.planning.devices import Device
from attnres_train.planning.experts import exchange_bytes
from attnres_train.planning.grids import Grid

_FP32 = 4


class Group(NamedTuple):
    """Ranks that exchange something: every ``stride``-th of all."""

    size: int
    stride: int


class Links:
    """The links of ``device`` under the groups of ``config``'s grids."""

    def __init__(self, config: RunConfig, device: Device, narrow: int) -> None:
        self.config, self.model, self.device, self.narrow = config, config.model, device, narrow
        layers = range(config.model.num_layers)
        model = config.model
        self._moe = np.array([not model.is_dense(n) for n in layers], dtype=float)
        self._mla = np.array([model.is_full_attention(n) for n in layers], dtype=float)
        gathered = [1 + (model.is_dense(n) or model.moe.num_shared_experts > 0) for n in layers]
        self._gathered = np.array(gathered, dtype=float)
        self._experts = cache(self._exchange_bytes)

    def ring(self, group: Group) -> float:
        """Bytes/s that a rank of ``group`` sends in a ring through all of it."""
        device, here = self.device, self._on_node(group)
        inside = device.node_link * device.node_share
        if here == group.size:
            return inside
        return min(inside, here * device.network_link * device.network_share)

    def exchange(self, group: Group, sent: float) -> float:
        """Seconds in which every rank of ``group`` sends ``sent`` bytes, as many to each other."""
        device, here = self.device, self._on_node(group)
        if group.size == 1:
            return 0.0
        outside = (group.size - here) / (group.size - 1)
        return max(
            (1 - outside) * sent / (device.node_link * device.node_share),
            outside * sent / (device.network_link * device.network_share),
        )

    def hop(self, grid: Grid) -> float:
        """Bytes/s between pipeline stages."""
        return self.ring(Group(grid.pipeline, grid.stage))

    def _on_node(self, group: Group) -> int:
        return max(1, min(group.size, self.device.node_size // group.stride))

    def sent(self, grid: Grid, tokens: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """[L] bytes that a rank sends in the forward and the backward pass of a layer, by group.
        ``tokens`` as `planning.experts.stream_tokens`."""
        found = {}
        if grid.expert > 1:
            forward, backward = self.experts(grid)
            found["expert"] = forward * self._moe, backward * self._moe
        if grid.tensor > 1:
            found["tensor"] = self._tensor(grid, tokens)
        if grid.context > 1:
            found["context"] = self._context(grid)
        return found

    def exchanges(self, grid: Grid, tokens: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """[L] seconds of the same. Nothing is taken to be hidden behind computation."""
        groups = {
            "expert": Group(grid.expert, 1),
            "tensor": Group(grid.tensor, 1),
            "context": Group(grid.context, grid.tensor),
        }
        found = {}
        for kind, (forward, backward) in self.sent(grid, tokens).items():
            if kind == "expert":
                rate = 1 / self.exchange(groups[kind], 1.0)
            else:
                rate = self.ring(groups[kind])
            found[kind] = forward / rate, backward / rate
        return found

    def experts(self, grid: Grid) -> tuple[float, float]:
        """Bytes of one layer's exchange of tokens, forward and backward."""
        return self._experts(grid._replace(data=1, pipeline=1, virtual=1, layout="even"))

    def _exchange_bytes(self, grid: Grid) -> tuple[float, float]:
        one = exchange_bytes(grid.of(self.config), self.narrow)
        return one.forward, one.backward

    def _tensor(self, grid: Grid, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """A gather before and a reduce-scatter after every sublayer that wants all tokens, and as
        many of gradients; the sublayer's input is gathered again where it is recomputed. The same
        after the embedding and before the head."""
        one = (grid.tensor - 1) * tokens * self.model.hidden_size * self.narrow
        both = 2 * self._gathered
        ends = np.zeros_like(both)
        ends[0] += 1
        ends[-1] += 1
        again = both if grid.recompute == "full" else 0
        return one * (both + ends), one * (both + ends + again)

    def _context(self, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
        """MLA gathers latents and shared keys, and gradients go the same ways. KDA gathers the
        transition and the final state of each of two shares a rank, and gradients of the latter;
        the tails of its convolutions go to the share behind alone (`parallel.context`)."""
        model, train = self.model, self.config.train
        share = train.seq_length // grid.context
        latent = model.mla.kv_lora_rank + model.mla.qk_rope_head_dim
        of_mla = (grid.context - 1) * share * latent * self.narrow
        kda = model.kda
        heads = -(-kda.num_heads // grid.tensor)
        states = (grid.context - 1) * 2 * heads * kda.head_dim**2 * _FP32
        tails = 2 * (kda.short_conv_kernel_size - 1) * 3 * heads * kda.head_dim * self.narrow
        forward, backward = (
            grid.micro_batch * (of_mla * self._mla + (number * states + tails) * (1 - self._mla))
            for number in (2, 1)
        )
        again = forward if grid.recompute == "full" else 0
        return forward, backward + again

    def updates(self, grid: Grid, elements: float, experts: float, stored: int) -> dict[str, float]:
        """Bytes that a rank sends once a step, of its ``elements`` numbers of parameters, of which
        ``experts`` are routed experts': gradients to their owners, parameters from them."""
        found = {}
        whole, split = self._groups(grid)
        for name, number, size in (("gradients", _FP32, 1.0), ("parameters", stored, 1.0)):
            if not self.config.optimizer.sharded:
                size = {"gradients": 2.0, "parameters": 0.0}[name]
            found[name] = (
                size
                * number
                * ((elements - experts) * _others(whole.size) + experts * _others(split.size))
            )
        return found

    def update_seconds(
        self, grid: Grid, elements: float, experts: float, stored: int
    ) -> tuple[float, float]:
        """Seconds of gradients and of parameters on their way."""
        whole, split = self._groups(grid)
        both = (elements - experts) * _others(whole.size) / self.ring(whole)
        both += experts * _others(split.size) / self.ring(split)
        if not self.config.optimizer.sharded:
            return 2 * _FP32 * both, 0.0
        return _FP32 * both, stored * both

    def _groups(self, grid: Grid) -> tuple[Group, Group]:
        """Who hold the same of all but experts, and of experts. (What tensor-parallel ranks share
        has fewer replicas, on as many ports.)"""
        return Group(grid.stage, 1), Group(grid.stage // grid.expert, grid.expert)


def _others(size: int) -> float:
    """Of what a group of ``size`` reduces, the share that a rank sends."""
    return (size - 1) / size
