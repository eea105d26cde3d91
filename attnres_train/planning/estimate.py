"""What a grid takes: memory of its fullest rank, time of a step. Estimates, quick enough to make
tens of thousands; `Estimator.simulated` replaces the formula for bubbles by a simulation.

Shapes: P pipeline ranks, V virtual stages, C = P V chunks, K kinds of work (`workload.WORK`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from attnres_train.config.kinds import kind_of
from attnres_train.config.schema import RunConfig
from attnres_train.model.flops import layer_costs, training_flops_per_token
from attnres_train.pipeline.plan.layout import make_layout
from attnres_train.pipeline.plan.schedule import Schedule
from attnres_train.pipeline.plan.simulate import Costs, simulate
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.pipeline.plan.validate import Report, validate
from attnres_train.planning.costs import GRADIENT_BYTES, PARAMETER_BYTES, read_bytes
from attnres_train.planning.devices import Device
from attnres_train.planning.grids import Grid
from attnres_train.planning.workload import WORK, Workload

_UPDATE_NUMBERS = 2**26  # of a batch of matrices (`optim.muon`), in gradients' and narrow dtype


class Shape(NamedTuple):
    """What a pipeline's order depends on."""

    pipeline: int
    virtual: int
    layout: str
    recompute: str
    micro_batches: int


@dataclass(frozen=True)
class Order:
    """A schedule of as many micro-batches as fill the pipeline, and what it holds at a time."""

    plan: TransportPlan
    schedule: Schedule
    stored: Report
    alive: np.ndarray
    """[P, n, V] micro-batches whose backward pass is to come, by chunk, whenever there are most."""


class Step(NamedTuple):
    seconds: float
    parts: dict[str, float]
    """Seconds of the busiest rank by what they are spent on; ``idle`` are those between."""


class Estimator:
    """Of the grids of ``config`` on ``device``."""

    def __init__(self, config: RunConfig, device: Device) -> None:
        self.config, self.model, self.device = config, config.model, device
        self.work = Workload(config, device)
        self.links = self.work.links
        self.stored_bytes = PARAMETER_BYTES[config.train.precision]
        self.order = cache(self._order)
        self._bounds = cache(self._layer_bounds)
        self._fixed = cache(self._fixed_memory)
        self._per_token = cache(self._kept_per_token)
        length = config.train.seq_length
        self.flops_per_token = training_flops_per_token(config.model, length)
        self.tokens_per_step = config.train.global_batch_size * length

    def micro_batches(self, grid: Grid) -> int:
        return self.config.train.global_batch_size // (grid.data * grid.micro_batch)

    def order_of(self, grid: Grid, rounds: int = 3) -> Order:
        """Of ``rounds`` micro-batches per pipeline rank, or all if those are fewer."""
        return self.order(self._shape(grid, rounds))

    def _shape(self, grid: Grid, rounds: int = 3) -> Shape:
        count = min(self.micro_batches(grid), rounds * grid.pipeline)
        return Shape(grid.pipeline, grid.virtual, grid.layout, grid.recompute, count)

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
        order, (kept, rerun, blocks) = self.order(shape), self._per_token(shape)
        kept = kept * tokens
        if grid.tensor > 1 and grid.recompute != "full":  # what sublayers read, of all tokens
            gathered = 2 * (grid.tensor - 1) * tokens * model.hidden_size * narrow
            kept += gathered * self._chunk_sizes(shape)
        if self.stored_bytes > narrow and grid.recompute != "full":
            # Autocast's copies of weights live as long as a micro-batch's activations.
            elements = self.work.held(grid.tensor, grid.expert)["elements"]
            kept += narrow * self._by_chunk(grid, elements).reshape(grid.virtual, grid.pipeline).T
        # The fused loss makes the head's gradient in its forward pass.
        kept[-1, -1] += model.hidden_size * model.vocab_size * narrow / grid.tensor
        unit = tokens * model.stream_size * narrow
        widest = max((hop.units for hop in order.plan.hops), default=0)
        # Beside the hops: rows sent and received, and their sums, of one layer.
        exchange = 2 * self.links.experts(grid)[0] if grid.expert > 1 else 0.0
        return {
            "activations": (order.alive * kept[:, None, :]).sum(-1).max(-1) + rerun * tokens,
            "block_store": blocks * unit,
            "buffers": np.full(grid.pipeline, 2.0 * widest * unit + exchange),
        }

    def _kept_per_token(self, shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bytes per token that chunks keep [P, V], that recomputation makes at a time [P] (as
        `CostModel` has it), and units that ranks store [P]."""
        order, model, narrow = self.order(shape), self.model, self.work.narrow
        bounds = self._bounds(*shape[:4])[:-1]

        def dealt(of_chunks: np.ndarray) -> np.ndarray:
            return of_chunks.reshape(shape.virtual, shape.pipeline).T

        kept = dealt(np.add.reduceat(self.work.kept(shape.recompute), bounds))
        if shape.recompute == "full":
            rerun = dealt(np.maximum.reduceat(self.work.kept("none"), bounds)).max(1)
        elif shape.recompute == "selective":
            together = np.minimum(model.block_size or 0, 2 * self._chunk_sizes(shape).max(1))
            rerun = read_bytes(model, narrow) + together * model.hidden_size * narrow
        else:
            rerun = np.zeros(shape.pipeline)
        blocks = np.array(order.stored.peak_blocks) + np.array(order.stored.peak_partials)
        return kept, rerun, blocks

    def _chunk_sizes(self, shape: Shape) -> np.ndarray:
        """[P, V] layers."""
        sizes = np.diff(self._bounds(*shape[:4]))
        return sizes.reshape(shape.virtual, shape.pipeline).T

    # Time

    def step(self, grid: Grid) -> Step:
        """A step by formula: the slowest rank's passes, the others' once, and the update."""
        passes = self._passes(grid)
        ranks = passes.sum(-1)
        slowest = int(ranks.argmax())
        count = self.micro_batches(grid)
        idle = (ranks.sum() - ranks[slowest]) / grid.virtual
        return self._whole(grid, passes, slowest, count * ranks[slowest] + idle)

    def simulated(self, grid: Grid) -> Step:
        """A step by simulation of hops and passes. Of many micro-batches those that fill the
        pipeline are simulated, and the rest take as long as the last of them."""
        passes = self._passes(grid)
        slowest = int(passes.sum(-1).argmax())
        count = self.micro_batches(grid)
        if grid.pipeline == 1:
            return self._whole(grid, passes, slowest, count * float(passes.sum()))
        forward, backward = (self._by_chunk(grid, one.sum(-1)) for one in self.work.times(grid))
        unit = self.work.tokens(grid) * self.model.stream_size * self.work.narrow
        costs = Costs(list(forward), list(backward), unit / self.links.hop(grid))
        few, more = self.order_of(grid), self.order_of(grid, rounds=4)
        seconds = [simulate(one.plan, one.schedule, costs, "eager", record=False).seconds
                   for one in (few, more)]
        simulated = min(count, 4 * grid.pipeline)
        rest = count - simulated
        each = (seconds[1] - seconds[0]) / max(1, simulated - min(count, 3 * grid.pipeline))
        return self._whole(grid, passes, slowest, seconds[1] + rest * each)

    def _passes(self, grid: Grid) -> np.ndarray:
        """[P, K] seconds of one micro-batch on every rank."""
        forward, backward = self.work.times(grid)
        return self._by_rank(grid, forward + backward)

    def _whole(self, grid: Grid, passes: np.ndarray, rank: int, seconds: float) -> Step:
        """With what comes once a step: gradients, the update, parameters."""
        parts = dict(zip(WORK, self.micro_batches(grid) * passes[rank], strict=True))
        parts["idle"] = max(0.0, seconds - sum(parts.values()))
        gradients, update, parameters = self._update(grid, rank)
        parts |= {"gradients": gradients, "optimizer": update, "parameters": parameters}
        once = gradients + update + parameters
        return Step(float(seconds + once), {name: float(one) for name, one in parts.items()})

    def _update(self, grid: Grid, rank: int) -> tuple[float, float, float]:
        device, held = self.device, self.work.held(grid.tensor, grid.expert)
        of_rank = {name: self._by_rank(grid, layers)[rank] for name, layers in held.items()}
        gradients, parameters = self.links.update_seconds(
            grid, of_rank["elements"], of_rank["experts"], self.stored_bytes
        )
        first, last = (self._by_rank(grid, one.sum(-1))[rank] for one in self.work.times(grid))
        owners = grid.stage if self.config.optimizer.sharded else 1
        work = of_rank["work"] / owners / (device.peak_flops * device.newton_schulz)
        moved = 2 * of_rank["state"] / owners + 2 * GRADIENT_BYTES * of_rank["elements"]
        update = work + moved / (device.memory_bandwidth * device.memory_share)
        return (
            max(0.0, gradients - device.overlap * last),
            update,
            max(0.0, parameters - device.overlap * first),
        )

    # Layouts

    def _by_chunk(self, grid: Grid, of_layers: np.ndarray) -> np.ndarray:
        bounds = self._bounds(grid.pipeline, grid.virtual, grid.layout, grid.recompute)
        return np.add.reduceat(of_layers, bounds[:-1], axis=0)

    def _by_rank(self, grid: Grid, of_layers: np.ndarray) -> np.ndarray:
        chunks = self._by_chunk(grid, of_layers)
        return chunks.reshape(grid.virtual, grid.pipeline, *of_layers.shape[1:]).sum(0)

    def _layer_bounds(self, pipeline: int, virtual: int, layout: str, recompute: str) -> np.ndarray:
        model, length = self.model, self.config.train.seq_length
        costs = layer_costs(model, length, recompute) if layout == "auto" else ()
        made = make_layout(
            model.num_layers, model.block_size, pipeline, virtual, layout, costs
        )
        return np.array(made.bounds)

    def _order(self, shape: Shape) -> Order:
        bounds = self._bounds(shape.pipeline, shape.virtual, shape.layout, shape.recompute)
        sizes = [int(size) for size in np.diff(bounds)]
        model = self.model
        layout = make_layout(model.num_layers, model.block_size, *shape[:2], sizes)
        plan, kind = TransportPlan(layout), kind_of(self.config, "pipeline.schedule")
        with kind.faults_named():
            schedule = kind.schedule(shape.pipeline, shape.virtual, shape.micro_batches)
            stored = validate(plan, schedule)
        alive = [list(_most_alive(actions, rank, shape)) for rank, actions in enumerate(schedule)]
        rows = max(map(len, alive))
        padded = [[*of, *([of[0]] * (rows - len(of)))] for of in alive]
        return Order(plan, schedule, stored, np.array(padded, dtype=float))


def _most_alive(actions: tuple, rank: int, shape: Shape) -> Iterator[tuple[int, ...]]:
    """The counts, by virtual stage, of micro-batches in flight that no others exceed."""
    count, seen = [0] * shape.virtual, set()
    for kind, chunk, _ in actions:
        count[chunk // shape.pipeline] += 1 if kind == "F" else -1
        seen.add(tuple(count))
    for one in sorted(seen):
        if not any(other != one and all(map(int.__le__, one, other)) for other in seen):
            yield one
