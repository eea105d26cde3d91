"""The pipeline of a configuration: its layout and transport plan, without building a model."""

from __future__ import annotations

from attnres_train.config.layout_text import stated_layers
from attnres_train.config.schema import RunConfig
from attnres_train.pipeline.plan.layout import Layout, make_layout
from attnres_train.pipeline.plan.transport_plan import TransportPlan


def build_plan(config: RunConfig) -> TransportPlan:
    """The transport plan of ``config``. Raises UserError if its layers cannot be split that way."""
    return TransportPlan(_layout(config))


def chunk_layers(config: RunConfig) -> list[int]:
    """Decoder layers of each chunk, in model order. Raises UserError like `build_plan`."""
    layout = _layout(config)
    return [len(layout.layers(chunk)) for chunk in range(layout.num_chunks)]


def _layout(config: RunConfig) -> Layout:
    model, parallel, costs = config.model, config.parallel, []
    if parallel.layout == "auto":
        # Imported here: it loads torch, which nothing else about a layout needs.
        from attnres_train.model.flops import layer_costs

        costs = layer_costs(model, config.train.seq_length, config.train.recompute)
    return make_layout(
        model.num_layers,
        model.block_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
        stated_layers(parallel.layout) or parallel.layout,
        costs,
        model.residual_kind.partial_units,
    )
