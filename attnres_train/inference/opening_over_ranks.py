"""A model from a checkpoint of whatever layout, over the ranks of another: each loads its own
layers, experts and heads alone."""

from __future__ import annotations

from pathlib import Path

import torch

from attnres_train.config.schema import RunConfig
from attnres_train.inference.decoding import CachedDecoder
from attnres_train.inference.opening import load_chunks
from attnres_train.inference.over_ranks import decoder_of
from attnres_train.model.ports import Ports
from attnres_train.model.precision import STREAM_DTYPE
from attnres_train.parallel.context import sequence_exchange
from attnres_train.parallel.dispatchers import token_exchange
from attnres_train.parallel.ranks import Ranks
from attnres_train.parallel.tensor import tensor_split
from attnres_train.pipeline.plan.messages import channels
from attnres_train.pipeline.run.engine import Engine
from attnres_train.pipeline.run.transport import P2PTransport
from attnres_train.planning.build import build_plan


def open_over_ranks(
    config: RunConfig, step_folder: Path, ranks: Ranks, dtype: torch.dtype | None = None
) -> CachedDecoder:
    """This rank's decoder of the model in ``step_folder``, for `over_ranks.led_by_main`.

    ``config`` is the saved one on the grid of ``ranks`` (`grid.on_grid`), ``dtype`` as for
    `opening.open_model`. Collective; raises UserError, on every rank, for a checkpoint that does
    not fit, and BrokenCheckpoint for one that is damaged.
    """
    plan = build_plan(config)
    layout = plan.layout
    mine = list(layout.chunks_of(ranks.pp_rank))
    ports = Ports(
        token_exchange(config, ranks.experts),
        tensor_split(ranks.tensor),
        sequence_exchange(ranks.context),
    )
    layers = [layout.layers(index) for index in mine]
    loaded = load_chunks(config, step_folder, layers, ranks.device, dtype, ports, ranks)
    chunks = dict(zip(mine, loaded, strict=True))
    engine = Engine(
        chunks,
        plan,
        ranks.pp_rank,
        P2PTransport(channels(plan), ranks.pipelines, ranks.group_timeout, ranks.device),
        hidden_size=config.model.stream_size,
        stream_dtype=dtype or STREAM_DTYPE[config.train.precision],
        device=ranks.device,
        debug=config.pipeline.debug,
    )
    return decoder_of(chunks, engine, ranks)
