"""The parts of a run on this rank: data, chunks, engine, optimizer, checkpoints and observers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from attnres_train.config.kinds import kind_of
from attnres_train.config.schema import RunConfig
from attnres_train.data.loader import open_data
from attnres_train.data.prepare import Prepared
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.flops import training_flops_per_token
from attnres_train.model.init import init_weights
from attnres_train.model.parameters import parameter_rules
from attnres_train.model.ports import Ports
from attnres_train.model.precision import PARAMETER_DTYPE, STREAM_DTYPE, autocast_dtype
from attnres_train.observe.build import build_observers, looks_at_gradients
from attnres_train.observe.hardware import peak_flops
from attnres_train.observe.observer import RunContext, RunInfo
from attnres_train.optim.build import build_optimizer, made_whole
from attnres_train.optim.hybrid import HybridOptimizer, needs_master
from attnres_train.optim.kinds import optimizer_kind
from attnres_train.parallel.context import sequence_exchange
from attnres_train.parallel.dispatchers import token_exchange
from attnres_train.parallel.gathering import ParameterGather
from attnres_train.parallel.linear import linear_maps
from attnres_train.parallel.matrices import matrix_exchange
from attnres_train.parallel.owned import OwnedOptimizer
from attnres_train.parallel.pieces import Held, make_pieces
from attnres_train.parallel.ranks import Ranks
from attnres_train.parallel.reduction import GradientReduction
from attnres_train.parallel.replicas import broadcast_from_first, by_replicas
from attnres_train.parallel.tensor import tensor_split
from attnres_train.pipeline.plan.messages import channels
from attnres_train.pipeline.plan.schedule import forward_only
from attnres_train.pipeline.plan.schedule_kinds import PipelineSchedule
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.pipeline.run.engine import Engine
from attnres_train.pipeline.run.transport import P2PTransport
from attnres_train.planning.bubble import planned_bubble
from attnres_train.planning.build import build_plan
from attnres_train.planning.facts import count_parameters
from attnres_train.planning.updates import update_of
from attnres_train.runs.preparation import Lists
from attnres_train.supervise.watch import Pulse
from attnres_train.training.parts import Parts
from attnres_train.training.run_state import Checkpoints
from attnres_train.training.samples import Samples


def build_parts(
    config: RunConfig, ranks: Ranks, prepared: Prepared, pulse: Pulse, files: Lists | None = None
) -> Parts:
    """Data, chunks, engine, optimizer, checkpoints and observers of this rank. ``files``: those of
    the corpora, for the run folder."""
    plan = build_plan(config)
    chunks = build_chunks(config, plan, ranks)
    optimizer, update = build_update(config, chunks, ranks)
    kind: PipelineSchedule = kind_of(config, "pipeline.schedule")
    engine = Engine(
        chunks,
        plan,
        ranks.pp_rank,
        P2PTransport(channels(plan), ranks.pipelines, ranks.group_timeout, ranks.device),
        hidden_size=config.model.stream_size,
        stream_dtype=STREAM_DTYPE[config.train.precision],
        device=ranks.device,
        debug=config.pipeline.debug,
        schedule=kind.schedule,
        on_pass=pulse.beat,
        share=tensor_split(ranks.tensor).share,
    )
    train = config.train
    num_micro_batches = train.global_batch_size // (train.micro_batch_size * ranks.dp_size)
    with kind.faults_named():
        engine.program(engine.schedule, num_micro_batches)  # validated now, before step 1
    engine.program(forward_only, num_micro_batches)
    folder = Path(config.run.dir) / config.run.name
    saved = list(chunks.values())
    samples = None
    if config.log.samples.interval:
        samples = Samples(config, ranks, chunks, engine, prepared)
    return Parts(
        chunks=chunks,
        engine=engine,
        optimizer=update,
        data=open_data(config, prepared),
        checkpoints=Checkpoints(config, ranks, folder, saved, optimizer, prepared, files),
        observers=build_observers(run_context(config, ranks, folder, chunks, prepared)),
        flops_per_token=partial(training_flops_per_token, config.model),
        peak_flops=peak_flops(ranks.device),
        samples=samples,
        planned_bubble=planned_bubble(config, plan, num_micro_batches) if ranks.is_main else None,
        pulse=pulse,
    )


def build_update(
    config: RunConfig, chunks: Mapping[int, ModelChunk], ranks: Ranks
) -> tuple[HybridOptimizer, OwnedOptimizer]:
    """The optimizer over what this rank owns of ``chunks``, and as one of the whole model."""
    rules = {n: r for chunk in chunks.values() for n, r in parameter_rules(chunk).items()}
    held = [
        Held(index, name, parameter, ranks.replicas(rules[name]))
        for index, chunk in chunks.items()
        for name, parameter in chunk.named_parameters()
    ]
    kind = optimizer_kind(config.optimizer)
    costs = {
        name: update_of(
            kind, name, tuple(p.shape), rules[name], needs_master(p), ranks.tensor.size()
        )
        for _, name, p, _ in held
    }
    pieces = make_pieces(held, costs, config.optimizer.sharded)
    mine = [(piece.name, piece.tensor) for piece in pieces if piece.is_mine]
    exchange = matrix_exchange(made_whole(mine, rules, config.optimizer), ranks.tensor)
    optimizer = build_optimizer(mine, rules, config.optimizer, ranks.device, exchange)
    gather = ParameterGather(
        chunks, pieces, lambda p: chunks[p.chunk].first_reader(p.parameter_name)
    )
    reduction = GradientReduction(
        pieces,
        ranks.dp_size,
        to_all=looks_at_gradients(config),
        late={name for chunk in chunks.values() for name in chunk.read_rules()},
    )
    return optimizer, OwnedOptimizer(optimizer, reduction, gather)


def run_context(
    config: RunConfig,
    ranks: Ranks,
    folder: Path,
    chunks: dict[int, ModelChunk],
    prepared: Prepared,
) -> RunContext:
    """What this rank's observers know of the run."""
    info = RunInfo(
        num_parameters=count_parameters(config.model).total,
        num_tokens=prepared.num_tokens,
        unigram_entropy=prepared.unigram_entropy_nats,
        bytes_per_token=prepared.bytes_per_token,
    )
    return RunContext(
        config=config,
        folder=folder,
        info=info,
        rank=ranks.rank,
        world_size=ranks.world_size,
        pp_rank=ranks.pp_rank,
        dp_rank=ranks.dp_rank,
        device=ranks.device,
        chunks=chunks,
        counted=counted_here(chunks, ranks),
        control=ranks.control,
    )


def counted_here(chunks: Mapping[int, ModelChunk], ranks: Ranks) -> frozenset[torch.nn.Parameter]:
    """The parameters of which this process is the first that has them."""
    return frozenset(
        chunk.get_parameter(name)
        for chunk in chunks.values()
        for name, rule in parameter_rules(chunk).items()
        if ranks.replicas(rule).rank() == 0
    )


def build_chunks(config: RunConfig, plan: TransportPlan, ranks: Ranks) -> dict[int, ModelChunk]:
    """This rank's chunks by index, with initial weights that do not depend on the layout, and are
    the same on all replicas. Collective."""
    chunks, precision = {}, config.train.precision
    dtype = PARAMETER_DTYPE[precision]
    autocast = autocast_dtype(precision)
    ports = Ports(
        exchange=token_exchange(config, ranks.experts),
        split=tensor_split(ranks.tensor, linear_maps(config.train, ranks.device, dtype, autocast)),
        sequence=sequence_exchange(ranks.context),
    )
    for index in plan.layout.chunks_of(ranks.pp_rank):
        layers = plan.layout.layers(index)
        chunk = ModelChunk(
            config.model,
            layers.start,
            layers.stop,
            recompute=config.train.recompute,
            stream_dtype=STREAM_DTYPE[precision],
            autocast_dtype=autocast,
            device=ranks.device,
            dtype=dtype,
            ports=ports,
        )
        init_weights(chunk, config.run.seed)
        chunks[index] = chunk
        rules = parameter_rules(chunk)
        named = [(p, rules[name]) for name, p in chunk.named_parameters()]
        for part in by_replicas([*named, *((b, None) for b in chunk.buffers())], ranks):
            broadcast_from_first(part.parameters, part.replicas)
    return chunks
