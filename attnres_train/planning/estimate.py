"""What a grid takes: memory of its fullest rank, time of a step. Estimates, quick enough to make
tens of thousands; `Estimator.simulated` replaces the formula for bubbles by a simulation.

Shapes: P pipeline ranks, V virtual stages, C = P V chunks, K kinds of work (`workload.WORK`).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from attnres_train.config.schema import RunConfig
from attnres_train.model.flops import layer_costs, training_flops_per_token
from attnres_train.pipeline.plan.layout import make_layout
from attnres_train.pipeline.plan.simulate import Costs, simulate
from attnres_train.planning.costs import GRADIENT_BYTES, PARAMETER_BYTES, read_bytes
from attnres_train.planning.devices import Device
from attnres_train.planning.grids import Grid
from attnres_train.planning.orders import Order, Shape, extrapolated, make_order
from attnres_train.planning.workload import WORK, Workload

_UPDATE_NUMBERS = 2**26  # of a batch of matrices (`optim.muon`), in gradients' and narrow dtype


class Step(NamedTuple):
    seconds: float
    parts: dict[str, float]
    """Seconds by what they are spent on, the mean of all ranks; ``idle`` are those between passes:
    bubbles, and waiting for ranks that have more to do."""


class Estimator:
    """Of the grids of ``config`` on ``device``."""

    def __init__(self, config: RunConfig, device: Device) -> None:
        self.config, self.model, self.device = config, config.model, device
        self.work = Workload(config, device)
        self.links = self.work.links
        self.stored_bytes = PARAMETER_BYTES[config.train.precision]
        self.order = cache(lambda shape: make_order(config, shape))
        self._bounds = cache(self._layer_bounds)
        self._fixed = cache(self._fixed_memory)
        self._per_token = cache(self._kept_per_token)
        length = config.train.seq_length
        self.flops_per_token = training_flops_per_token(config.model, length)
        self.tokens_per_step = config.train.global_batch_size * length

    def micro_batches(self, grid: Grid) -> int:
        return self.config.train.global_batch_size // (grid.data * grid.micro_batch)

    def order_of(self, grid: Grid) -> Order:
        """Of all micro-batches, or as many as fill the pipeline."""
        return self.order(self._shape(grid))

    def _shape(self, grid: Grid) -> Shape:
        count = self.micro_batches(grid)
        if self.config.pipeline.schedule == "1f1b":  # others may hold more, the more there are
            count = min(count, 3 * grid.pipeline)
        return Shape(grid.pipeline, grid.virtual, self._bounds_of(grid), count)

    def mfu(self, grid: Grid, seconds: float) -> float:
        """Useful FLOPs, no recomputation, over the devices' peak."""
        devices = grid.stage * grid.pipeline
        useful = self.tokens_per_step * self.flops_per_token
        return useful / (seconds * devices * self.device.peak_flops)

    # Memory

    def memory(self, grid: Grid) -> dict[str, float]:
        """Bytes of the rank that needs most, by what they are for, and their ``total``."""
        parts = self._fixed_of(grid) | self._varying_memory(grid)
        total = np.sum(list(parts.values()), axis=0)
        rank = int(total.argmax())
        return {name: float(part[rank]) for name, part in parts.items()} | {
            "total": float(total[rank])
        }

    def least_memory(self, grid: Grid) -> float:
        """Of parameters, gradients and optimizer alone: quick."""
        return float(np.sum(list(self._fixed_of(grid).values()), axis=0).max())

    def _fixed_of(self, grid: Grid) -> dict[str, np.ndarray]:
        recompute = grid.recompute if grid.layout == "auto" else "none"
        return self._fixed(grid._replace(micro_batch=1, recompute=recompute))

    def _fixed_memory(self, grid: Grid) -> dict[str, np.ndarray]:
        """[P] bytes that do not depend on the micro-batch."""
        held = self.work.held(grid.tensor, grid.expert)
        of_rank = {name: self._by_rank(grid, layers) for name, layers in held.items()}
        owners = grid.stage if self.config.optimizer.sharded else 1
        state = of_rank["state"] / (owners if owners > 1 else 1)
        update = np.full(grid.pipeline, _UPDATE_NUMBERS * (GRADIENT_BYTES + 3 * self.work.narrow))
        return {
            "parameters": of_rank["elements"] * self.stored_bytes,
            "gradients": of_rank["elements"] * GRADIENT_BYTES,
            "optimizer": state,
            "update": np.minimum(update, 4.0 * of_rank["elements"]),
        }

    def _varying_memory(self, grid: Grid) -> dict[str, np.ndarray]:
        """[P] bytes of activations, blocks and buffers."""
        model, narrow, tokens = self.model, self.work.narrow, self.work.tokens(grid)
        shape = self._shape(grid)
        order, (kept, rerun) = self.order(shape), self._per_token(shape, grid.recompute)
        kept = kept * tokens
        if grid.tensor > 1 and grid.recompute != "full":  # what sublayers read, of all tokens
            gathered = 2 * (grid.tensor - 1) * tokens * model.hidden_size * narrow
            kept += gathered * shape.dealt(np.diff(shape.bounds))
        if self.stored_bytes > narrow and grid.recompute != "full":
            # Autocast's copies of weights live as long as a micro-batch's activations.
            elements = self.work.held(grid.tensor, grid.expert)["elements"]
            kept += narrow * shape.dealt(self._by_chunk(grid, elements))
        # The fused loss makes the head's gradient in its forward pass.
        kept[-1, -1] += model.hidden_size * model.vocab_size * narrow / grid.tensor
        unit = self.unit_bytes(grid)
        # Beside the hops: rows sent and received, and their sums, of one layer.
        exchange = 2 * self.links.experts(grid)[0] if grid.expert > 1 else 0.0
        return {
            "activations": (order.alive * kept[:, None, :]).sum(-1).max(-1) + rerun * tokens,
            "block_store": order.stored_units * unit,
            "buffers": np.full(grid.pipeline, 2.0 * order.widest_hop * unit + exchange),
        }

    def _kept_per_token(self, shape: Shape, recompute: str) -> tuple[np.ndarray, np.ndarray]:
        """Bytes per token that chunks keep [P, V], and that recomputation makes at a time [P] (as
        `CostModel` has it)."""
        model, narrow = self.model, self.work.narrow
        kept = shape.dealt(np.add.reduceat(self.work.kept(recompute), shape.bounds[:-1]))
        if recompute == "full":
            most = np.maximum.reduceat(self.work.kept("none"), shape.bounds[:-1])
            rerun = shape.dealt(most).max(1)
        elif recompute == "selective":
            layers = shape.dealt(np.diff(shape.bounds)).max(1)
            together = np.minimum(model.block_size or 0, 2 * layers)
            rerun = read_bytes(model, narrow) + together * model.hidden_size * narrow
        else:
            rerun = np.zeros(shape.pipeline)
        return kept, rerun

    # Time

    def step(self, grid: Grid) -> Step:
        """A step by formula: the busiest rank's passes, and those of one micro-batch elsewhere."""
        passes, count = self._passes(grid), self.micro_batches(grid)
        ranks = passes.sum(-1)
        idle = (ranks.sum() - ranks.max()) / grid.virtual
        return self._whole(grid, passes, count * ranks.max() + idle)

    def simulated(self, grid: Grid) -> Step:
        """A step by simulation of hops and passes. Of many micro-batches those that fill the
        pipeline are simulated, and the rest take as long as the last of them."""
        passes, count = self._passes(grid), self.micro_batches(grid)
        if grid.pipeline == 1:
            return self._whole(grid, passes, count * float(passes.sum()))
        forward, backward = (self._by_chunk(grid, one.sum(-1)) for one in self.work.times(grid))
        unit = self.unit_bytes(grid) / self.links.hop(grid)
        costs = Costs(forward.tolist(), backward.tolist(), unit)

        def seconds(micro_batches: int) -> float:
            one = self.order(self._shape(grid)._replace(micro_batches=micro_batches))
            return simulate(one.plan, one.schedule, costs, "eager", record=False).seconds

        return self._whole(grid, passes, extrapolated(seconds, count, grid.pipeline))

    def unit_bytes(self, grid: Grid) -> int:
        """Of a block or partial of a micro-batch, on a rank."""
        return self.work.tokens(grid) * self.model.stream_size * self.work.narrow

    def sent(self, grid: Grid) -> dict[str, float]:
        """Bytes that the rank with most to send sends in a step, by group."""
        count, tokens = self.micro_batches(grid), self.work.tokens(grid)
        found = {"pipeline": count * self.order_of(grid).most_sent * float(self.unit_bytes(grid))}
        for group, passes in self.links.sent(grid, tokens).items():
            found[group] = count * float(self._by_rank(grid, passes[0] + passes[1]).max())
        held = self.work.held(grid.tensor, grid.expert)
        elements, experts = (self._by_rank(grid, held[name]) for name in ("elements", "experts"))
        rank = int(elements.argmax())
        return found | self.links.updates(
            grid, float(elements[rank]), float(experts[rank]), self.stored_bytes
        )

    def _passes(self, grid: Grid) -> np.ndarray:
        """[P, K] seconds of one micro-batch on every rank."""
        forward, backward = self.work.times(grid)
        return self._by_rank(grid, forward + backward)

    def _whole(self, grid: Grid, passes: np.ndarray, seconds: float) -> Step:
        """With what comes once a step: gradients, the update, parameters."""
        parts = dict(zip(WORK, self.micro_batches(grid) * passes.mean(0), strict=True))
        parts["idle"] = max(0.0, seconds - sum(parts.values()))
        once = self._update(grid)
        parts |= once
        return Step(float(seconds + sum(once.values())), {k: float(v) for k, v in parts.items()})

    def _update(self, grid: Grid) -> dict[str, float]:
        """Of the rank that has most parameters."""
        device, held = self.device, self.work.held(grid.tensor, grid.expert)
        of_ranks = {name: self._by_rank(grid, layers) for name, layers in held.items()}
        rank = int(of_ranks["elements"].argmax())
        elements, experts, state, work = (of_ranks[name][rank] for name in held)
        gradients, parameters = self.links.update_seconds(
            grid, elements, experts, self.stored_bytes
        )
        first, last = (self._by_rank(grid, one.sum(-1))[rank] for one in self.work.times(grid))
        owners = grid.stage if self.config.optimizer.sharded else 1
        moved = 2 * state / owners + 2 * GRADIENT_BYTES * elements
        update = work / owners / (device.peak_flops * device.newton_schulz)
        return {
            "gradients": max(0.0, gradients - device.overlap * last),
            "optimizer": update + moved / (device.memory_bandwidth * device.memory_share),
            "parameters": max(0.0, parameters - device.overlap * first),
        }

    # Layouts

    def _by_chunk(self, grid: Grid, of_layers: np.ndarray) -> np.ndarray:
        return np.add.reduceat(of_layers, self._bounds_of(grid)[:-1], axis=0)

    def _by_rank(self, grid: Grid, of_layers: np.ndarray) -> np.ndarray:
        chunks = self._by_chunk(grid, of_layers)
        return chunks.reshape(grid.virtual, grid.pipeline, *of_layers.shape[1:]).sum(0)

    def _bounds_of(self, grid: Grid) -> tuple[int, ...]:
        recompute = grid.recompute if grid.layout == "auto" else ""
        return self._bounds(grid.pipeline, grid.virtual, grid.layout, recompute)

    def _layer_bounds(
        self, pipeline: int, virtual: int, layout: str, recompute: str
    ) -> tuple[int, ...]:
        model, length = self.model, self.config.train.seq_length
        costs = layer_costs(model, length, recompute) if layout == "auto" else ()
        made = make_layout(model.num_layers, model.block_size, pipeline, virtual, layout, costs)
        return made.bounds
