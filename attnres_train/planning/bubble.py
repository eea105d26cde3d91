"""The bubble of a run's schedule, to lay a measured one beside."""

from __future__ import annotations

from attnres_train.config.kinds import kind_of
from attnres_train.config.schema import RunConfig
from attnres_train.model.flops import (
    head_flops_per_token,
    layer_flops_per_token,
    recomputed_flops,
)
from attnres_train.pipeline.plan.schedule_kinds import PipelineSchedule
from attnres_train.pipeline.plan.simulate import Costs, simulate
from attnres_train.pipeline.plan.transport_plan import TransportPlan


def planned_bubble(config: RunConfig, plan: TransportPlan, micro_batches: int) -> float | None:
    """Share of the ranks' time that ``micro_batches`` take in which they do not compute, were time
    as FLOPs and links of no cost: what the order of passes and uneven chunks come to. None for one
    rank, which has no peer to wait for."""
    layout = plan.layout
    if layout.num_ranks == 1:
        return None
    kind: PipelineSchedule = kind_of(config, "pipeline.schedule")
    schedule = kind.schedule(layout.num_ranks, layout.num_virtual_stages, micro_batches)
    forward, backward = [], []
    length, recompute = config.train.seq_length, config.train.recompute
    for chunk in range(layout.num_chunks):
        layers = layout.layers(chunk)
        parts = [layer_flops_per_token(config.model, layer, length) for layer in layers]
        again = sum(recomputed_flops(part, recompute) for part in parts)
        if layers.stop == config.model.num_layers:
            parts.append(head_flops_per_token(config.model))
        flops = sum(sum(part.values()) for part in parts)
        forward.append(flops)
        backward.append(2 * flops + again)
    costs = Costs(forward, backward, 0.0)
    return simulate(plan, schedule, costs, "standard", record=False).bubble
