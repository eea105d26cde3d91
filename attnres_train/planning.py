"""The pipeline of a configuration: its layout and transport plan, without building a model."""

from __future__ import annotations

from attnres_train.config.schema import RunConfig
from attnres_train.pipeline.layout import make_layout
from attnres_train.pipeline.plan import TransportPlan


def build_plan(config: RunConfig) -> TransportPlan:
    """The transport plan of ``config``. Raises UserError if its layers cannot be split that way."""
    parallel = config.parallel
    return TransportPlan(
        make_layout(
            config.model.num_layers,
            config.model.block_size,
            parallel.pipeline_model_parallel_size,
            parallel.virtual_pipeline_model_parallel_size,
            parallel.layout,
        )
    )
