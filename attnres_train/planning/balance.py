"""Whether the stages of a pipeline have as much to do as each other, and what would be better."""

from __future__ import annotations

from collections.abc import Iterator

from attnres_train.config.checks import data_parallel_size
from attnres_train.config.schema import RunConfig
from attnres_train.pipeline.plan.simulate import Costs, simulate
from attnres_train.planning.build import build_plan
from attnres_train.planning.costs import CostModel
from attnres_train.planning.orders import Shape, extrapolated, make_order

MUCH = 0.1
"""Idle share of a step from which on it is told."""
_NAMED = 2  # of better layouts
_WORTH = 0.02  # of the step: what another layout has to save to be named


def idle_share(config: RunConfig, world_size: int | None = None) -> float:
    """Share of a step in which the stages of a checked ``config`` are idle: by FLOPs, on links that
    cost nothing, so by layout and schedule alone."""
    plan, model = build_plan(config), CostModel(config)
    layout, train = plan.layout, config.train
    chunks = [model.chunk(layout.layers(chunk)) for chunk in range(layout.num_chunks)]
    costs = Costs([c.forward_flops for c in chunks], [c.backward_flops for c in chunks], 0.0)
    replicas = data_parallel_size(config, world_size)
    count = train.global_batch_size // (train.micro_batch_size * replicas)
    shape = Shape(layout.num_ranks, layout.num_virtual_stages, layout.bounds, count)

    def seconds(micro_batches: int) -> float:
        order = make_order(config, shape._replace(micro_batches=micro_batches))
        return simulate(plan, order.schedule, costs, "standard", record=False).seconds

    busy = count * sum(chunk.forward_flops + chunk.backward_flops for chunk in chunks)
    return 1 - busy / (layout.num_ranks * extrapolated(seconds, count, layout.num_ranks))


def imbalance(config: RunConfig, world_size: int | None = None) -> str | None:
    """What to tell of a checked ``config`` whose stages are idle for much of a step; None where
    they are not."""
    parallel = config.parallel
    if parallel.pipeline_model_parallel_size == 1:
        return None
    idle = idle_share(config, world_size)
    if idle <= MUCH:
        return None
    told = f"{idle:.0%} of a step (by layout and schedule alone)"
    shares = {name: idle_share(other, world_size) for name, other in _others(config)}
    better = {name: share for name, share in shares.items() if share < idle - _WORTH}
    if not better:
        return f"{told}; no layout helps, more micro-batches per step would: a larger global batch"
    named = sorted((share, name) for name, share in better.items())[:_NAMED]
    return f"{told}; {' or '.join(f'{share:.0%} with {name}' for share, name in named)}"


def _others(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    """Layouts that are always possible, by what to write for them."""
    parallel = config.parallel
    virtual = "virtual_pipeline_model_parallel_size"
    for layout in ("auto", "even"):
        for count in dict.fromkeys((parallel.virtual_pipeline_model_parallel_size, 1)):
            changed = {"layout": layout, virtual: count}
            own = {key: getattr(parallel, key) for key in changed}
            words = [
                f"parallel.{key}={value}" for key, value in changed.items() if own[key] != value
            ]
            if words:
                other = parallel.model_copy(update=changed)
                yield " ".join(words), config.model_copy(update={"parallel": other})
