"""The planner: everything that follows from a config, a machine and the number of processes."""

from __future__ import annotations

from dataclasses import asdict

from attnres_train.config.checks import data_parallel_size
from attnres_train.config.schema import RunConfig
from attnres_train.model.flops import training_flops_per_token
from attnres_train.parallel.ownership import Update, most_state_bytes
from attnres_train.pipeline.plan.parts import MODES, Mode
from attnres_train.pipeline.plan.schedule import Schedule, peak_in_flight
from attnres_train.pipeline.plan.schedule_kinds import to_compare
from attnres_train.pipeline.plan.simulate import Costs, simulate
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.pipeline.plan.validate import Report, validate
from attnres_train.planning.balance import imbalance
from attnres_train.planning.build import build_plan
from attnres_train.planning.costs import GRADIENT_BYTES, PARAMETER_BYTES, ChunkCosts, CostModel
from attnres_train.planning.machine import Machine
from attnres_train.planning.shapes import Picture
from attnres_train.planning.timeline import draw_timeline
from attnres_train.planning.window import asked

# Beyond this many passes only the slowest and the fastest of the exact transports are simulated.
_MANY_PASSES = 50_000


class Planner:
    """Everything that follows from a config, a machine and the number of processes."""

    def __init__(self, config: RunConfig, machine: Machine, world_size: int | None = None) -> None:
        self.config, self.machine, self.world_size = config, machine, world_size
        self.plan = build_plan(config)
        self.layout = self.plan.layout
        self.replicas = replicas = data_parallel_size(config, world_size)
        train = config.train
        self.micro_batches = train.global_batch_size // (train.micro_batch_size * replicas)
        self.model = CostModel(config)
        self.chunks = [
            self.model.chunk(self.layout.layers(c)) for c in range(self.layout.num_chunks)
        ]
        shape = (self.layout.num_ranks, self.layout.num_virtual_stages, self.micro_batches)
        self.schedules: dict[str, Schedule] = {}
        self.stored: dict[str, Report] = {}
        for name, kind in to_compare(config.pipeline).items():
            with kind.faults_named():
                self.schedules[name] = kind.schedule(*shape)
                self.stored[name] = validate(self.plan, self.schedules[name])

    @property
    def schedule(self) -> Schedule:
        """The run's own schedule."""
        return self.schedules[self.config.pipeline.schedule]

    def pass_costs(self) -> Costs:
        link = self.machine.link_bandwidth
        computed = self._computed()
        # As if nothing were computed while tokens are under way: that is the shared experts alone.
        exchanges = [(c.forward_exchange / link, c.backward_exchange / link) for c in self.chunks]
        return Costs(
            [one + there for one, (there, _) in zip(computed.forward, exchanges, strict=True)],
            [one + back for one, (_, back) in zip(computed.backward, exchanges, strict=True)],
            self.model.unit_bytes / link,
        )

    def _computed(self) -> Costs:
        """On links that cost nothing."""
        rate = self.machine.flops_rate
        return Costs(
            [chunk.forward_flops / rate for chunk in self.chunks],
            [chunk.backward_flops / rate for chunk in self.chunks],
            0.0,
        )

    def report(self) -> dict:
        """The plan, ready for JSON. Sizes in bytes, times in seconds, units and hops per
        micro-batch and direction."""
        own, unit = self.stored[self.config.pipeline.schedule], self.model.unit_bytes
        return {
            "run": self.config.run.name,
            "residual": self.config.model.residual.kind,
            "pipeline_ranks": self.layout.num_ranks,
            "virtual_stages": self.layout.num_virtual_stages,
            "micro_batches": self.micro_batches,
            "unit_bytes": unit,
            "units": asdict(self.plan.units()),
            "experts": asdict(self.model.exchange),
            "hops": _hops(self.plan, unit),
            "peak_blocks": own.peak_blocks,
            "peak_partials": own.peak_partials,
            "ranks": [self._rank(rank, own) for rank in range(self.layout.num_ranks)],
            "schedules": {name: self._schedule(name, one) for name, one in self.stored.items()},
            "machine": asdict(self.machine),
            "steps": self._steps(),
            "imbalance": imbalance(self.config, self.world_size),
        }

    def _rank(self, rank: int, stored: Report) -> dict:
        chunks = self.layout.chunks_of(rank)
        costs = [self.chunks[chunk] for chunk in chunks]
        return {
            "rank": rank,
            "layers": [_span(self.layout.layers(chunk)) for chunk in chunks],
            "parameters": sum(cost.parameters for cost in costs),
            "flops": sum(cost.forward_flops + cost.backward_flops for cost in costs),
            "exchange_bytes": sum(cost.forward_exchange + cost.backward_exchange for cost in costs),
            "memory": self._memory(rank, self.schedule, stored),
        }

    def _memory(self, rank: int, schedule: Schedule, stored: Report) -> dict[str, float]:
        """Bytes on ``rank`` by what they are for, and their total."""
        costs = [self.chunks[chunk] for chunk in self.layout.chunks_of(rank)]
        parameters = sum(cost.parameters for cost in costs)
        units = stored.peak_blocks[rank] + stored.peak_partials[rank]
        memory = {
            "parameters": parameters * PARAMETER_BYTES[self.config.train.precision],
            "gradients": parameters * GRADIENT_BYTES,
            "optimizer": self._optimizer_bytes(costs),
            "activations": self._activations(rank, schedule),
            "block_store": units * self.model.unit_bytes,
        }
        return {**memory, "total": sum(memory.values())}

    def _optimizer_bytes(self, chunks: list[ChunkCosts]) -> int:
        """On the replica that owns most of them."""
        whole = [update for chunk in chunks for update in chunk.updates]
        split = [update for chunk in chunks for update in chunk.split_updates]
        experts = [update for chunk in chunks for update in chunk.expert_updates]
        sharded, parallel = self.config.optimizer.sharded, self.config.parallel
        shards = self.replicas * parallel.context_parallel_size
        stage = shards * parallel.tensor_model_parallel_size
        groups = [(whole, stage), (split, shards), (experts, stage // self.model.exchange.ranks)]
        together: dict[int, list[Update]] = {}  # who have the same replicas are shared out as one
        for updates, replicas in groups:
            together.setdefault(replicas if sharded else 1, []).extend(updates)
        return sum(most_state_bytes(updates, ranks) for ranks, updates in together.items())

    def _activations(self, rank: int, schedule: Schedule) -> float:
        kept = peak_in_flight(schedule[rank], [chunk.activation_bytes for chunk in self.chunks])
        rerun = [self.chunks[chunk].recompute_bytes for chunk in self.layout.chunks_of(rank)]
        return kept + max(rerun)

    def _schedule(self, name: str, stored: Report) -> dict:
        # The bubble is that of the order alone.
        schedule = self.schedules[name]
        timeline = simulate(self.plan, schedule, self._computed(), "standard", record=False)
        memory = [self._memory(rank, schedule, stored) for rank in range(len(schedule))]
        return {
            "bubble": timeline.bubble,
            "peak_blocks": max(stored.peak_blocks),
            "activations": max(rank["activations"] for rank in memory),
            "memory": max(rank["total"] for rank in memory),
        }

    def _steps(self) -> dict[str, dict]:
        """Simulated step per transport. MFU counts useful FLOPs, no recomputation."""
        schedule, costs = self.schedule, self.pass_costs()
        many = sum(map(len, schedule)) > _MANY_PASSES
        # The standard residual first: all others are told relative to it.
        modes: tuple[Mode, ...] = ("standard", "eager") if many else MODES
        train, ranks = self.config.train, self.layout.num_ranks
        tokens = self.micro_batches * train.micro_batch_size * train.seq_length
        useful = tokens * training_flops_per_token(self.config.model, train.seq_length)
        steps: dict[str, dict] = {}
        for mode in modes:
            timeline = simulate(self.plan, schedule, costs, mode, record=False)
            seconds = timeline.seconds
            steps[mode] = {
                "seconds": seconds,
                "over_standard": seconds / steps["standard"]["seconds"] - 1 if steps else 0.0,
                "bubble": timeline.bubble,
                "mfu": useful / (seconds * ranks * self.machine.peak_flops),
            }
        return steps

    def picture(self, mode: Mode, window: str | None = None) -> Picture:
        """The simulated step, or its ``window`` (see `window.asked`). Raises UserError where that
        is none."""
        timeline = simulate(self.plan, self.schedule, self.pass_costs(), mode)
        shown = None if window is None else asked(window, timeline.seconds)
        return draw_timeline(self.plan, timeline, mode, shown)


def _hops(plan: TransportPlan, unit_bytes: int) -> list[dict]:
    return [
        {
            "src_chunk": hop.src_chunk,
            "dst_chunk": hop.dst_chunk,
            "src_rank": hop.src_rank,
            "dst_rank": hop.dst_rank,
            "held": hop.held,
            "fresh": hop.fresh,
            "partial": hop.partial,
            "bytes": hop.units * unit_bytes,
        }
        for hop in plan.hops
    ]


def _span(layers: range) -> tuple[int, int]:
    """First and last layer, 0-based, both in the chunk."""
    return layers[0], layers[-1]
