"""Relations between the values of a configuration, and between it and the machine: what the types
in `config.schema` cannot say. Cheap (no torch), so that it runs before any worker starts."""

from __future__ import annotations

from collections.abc import Iterator

from attnres_train.config.errors import ConfigError
from attnres_train.config.files import checkpoint_problems
from attnres_train.config.kinds import CHOICES, kinds_of
from attnres_train.config.layout_text import stated_layers
from attnres_train.config.schema import RunConfig
from attnres_train.config.split_checks import split_problems
from attnres_train.config.stages import named_once, stage_configs

Problems = Iterator[str]


def check_config(config: RunConfig, world_size: int | None = None, *, files: bool = True) -> None:
    """Raise ConfigError with every relation that does not hold.

    ``world_size`` is the number of processes the run has; None takes as many as the model needs at
    least. Without ``files`` a tokenizer's may be missing: those of another machine.
    """
    by_stage = [list(_problems(one, world_size, files)) for one in stage_configs(config)]
    problems = [*_stages(config), *named_once(config, by_stage), *checkpoint_problems(config)]
    if problems:
        raise ConfigError(problems)


def _problems(config: RunConfig, world_size: int | None, files: bool) -> Problems:
    """Of one stage."""
    for found in (
        _context(config),
        _model(config),
        _layout(config),
        _processes(config, world_size),
        split_problems(config),
        _experts(config, world_size),
        _batch(config, world_size),
        _data(config),
        _kinds(config, files),
        _reset(config),
        _kept(config),
        _samples(config),
    ):
        yield from found


def grid_problems(config: RunConfig, world_size: int) -> Problems:
    """Of layers, experts and processes alone: what the use of a model asks of its grid."""
    for found in (
        _layout(config),
        _processes(config, world_size),
        split_problems(config, samples=False),
        _experts(config, world_size),
    ):
        yield from found


def one_by_one_problems(config: RunConfig) -> Iterator[tuple[str, str]]:
    """With which keys, and values, of the grid no text can be made, and why."""
    parallel = config.parallel
    if parallel.expert_model_parallel_size > 1 and parallel.expert_dispatcher == "bounded":
        why = "a few tokens that all go to the same experts find no room there"
        yield "parallel.expert_dispatcher is bounded", why


def _stages(config: RunConfig) -> Problems:
    names = [stage.name for stage in config.stages]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            yield f"stages: {names.count(name)} are called {name}: give each a name of its own"


def data_parallel_size(config: RunConfig, world_size: int | None = None) -> int:
    """Replicas of the model, but for shared experts, among ``world_size`` processes (None: the
    least that hold the model), at least 1."""
    parallel = config.parallel
    return max(1, (world_size or parallel.least_processes) // parallel.model_parallel_size)


def _context(config: RunConfig) -> Problems:
    size, length = config.parallel.context_parallel_size, config.train.seq_length
    if size == 1:
        return
    shares, kernel = 2 * size, config.model.kda.short_conv_kernel_size
    least = shares * max(1, kernel - 1)
    named = f"parallel.context_parallel_size {size}: samples are cut into 2 x {size} = {shares}"
    if length < least:
        yield (
            f"train.seq_length {length} is too short for {named} shares, each of at least "
            f"model.kda.short_conv_kernel_size - 1 = {kernel - 1} tokens: take {least} or more, "
            "or lower parallel.context_parallel_size"
        )
    elif length % shares:
        below = length - length % shares
        near = f"{below} or " if below >= least else ""
        yield (
            f"train.seq_length {length} does not suit {named} equal shares, and {length} / "
            f"{shares} leaves {length % shares} over: take {near}{below + shares}"
        )


def _kept(config: RunConfig) -> Problems:
    every, interval = config.checkpoint.keep_every, config.checkpoint.save_interval
    if every and (not interval or every % interval):
        yield (
            f"checkpoint.keep_every is {every}, which has to be a multiple of "
            f"checkpoint.save_interval, {interval}"
        )


def _samples(config: RunConfig) -> Problems:
    if not config.log.samples.interval:
        return
    told = f"log.samples.interval is {config.log.samples.interval}"
    for given, why in one_by_one_problems(config):
        yield f"{told}, but {given}: {why}; set it to 0, and use attnres-train generate"
    if config.data.tokenizer.kind == "none":
        yield f"{told}, but data.tokenizer.kind is none: there is no text without a tokenizer"


def _model(config: RunConfig) -> Problems:
    model, moe = config.model, config.model.moe
    if moe.num_experts < moe.num_experts_per_token:
        yield (
            f"model.moe.num_experts_per_token is {moe.num_experts_per_token}, but "
            f"model.moe.num_experts is {moe.num_experts}: a token cannot use more experts than "
            "there are"
        )
    if moe.first_dense_layers > model.num_layers:
        yield (
            f"model.moe.first_dense_layers is {moe.first_dense_layers}, but model.num_layers is "
            f"{model.num_layers}"
        )
    layers = model.full_attention_layers or []
    outside = [layer for layer in layers if not 1 <= layer <= model.num_layers]
    if outside:
        yield (
            f"model.full_attention_layers names {outside}, but layers are counted from 1 to "
            f"model.num_layers = {model.num_layers}"
        )
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        yield f"model.full_attention_layers names {twice} more than once"
    clip = config.optimizer.qk_clip
    if clip and not any(map(model.is_full_attention, range(model.num_layers))):
        yield (
            f"optimizer.qk_clip is {clip:g}, but it scales heads of MLA layers, of which "
            "model.full_attention_layers leaves none: set it to 0, or name one there"
        )


def _split(config: RunConfig) -> str:
    parallel = config.parallel
    return (
        f"parallel.pipeline_model_parallel_size {parallel.pipeline_model_parallel_size} x "
        f"parallel.virtual_pipeline_model_parallel_size "
        f"{parallel.virtual_pipeline_model_parallel_size} = {parallel.num_chunks} chunks"
    )


def _layout(config: RunConfig) -> Problems:
    layout, layers = config.parallel.layout, config.model.num_layers
    try:
        stated = stated_layers(layout)
    except ConfigError as error:
        yield from error.problems
        return
    named = f"parallel.layout '{layout}'" if isinstance(layout, str) else "parallel.layout"
    if config.parallel.num_chunks > layers:
        yield (
            f"{_split(config)}, but model.num_layers is {layers}: every chunk needs at least one "
            "layer, so lower one of the two sizes"
        )
    elif stated is None:
        return
    elif len(stated) != config.parallel.num_chunks:
        yield f"{named} has {len(stated)} chunks, but {_split(config)}"
    elif min(stated) < 1:
        yield f"{named} is {stated}: every chunk needs at least one layer"
    elif sum(stated) != layers:
        yield f"{named} adds up to {sum(stated)} layers, but model.num_layers is {layers}"


def _processes(config: RunConfig, world_size: int | None) -> Problems:
    needed = config.parallel.model_parallel_size
    if world_size is None or (world_size > 0 and world_size % needed == 0):
        return
    below = max(0, world_size - world_size % needed)
    remedy = f"start {f'{below} or ' if below else ''}{below + needed} processes"
    sizes = {
        f"parallel.{kind}_size": getattr(config.parallel, f"{kind}_size")
        for kind in ("pipeline_model_parallel", "tensor_model_parallel", "context_parallel")
    }
    counted = [key for key, size in sizes.items() if size > 1] or list(sizes)[:1]
    arithmetic = " x ".join(f"{key} {sizes[key]}" for key in counted)
    yield (
        f"the number of processes (WORLD_SIZE or --nproc) is {world_size}, but a replica of the "
        f"model takes {needed} ({arithmetic}): {remedy}, or change {' or '.join(counted)}"
    )


def _experts(config: RunConfig, world_size: int | None) -> Problems:
    parallel, experts = config.parallel, config.model.moe.num_experts
    key, size = "parallel.expert_model_parallel_size", parallel.expert_model_parallel_size
    if experts % size:
        fitting = [n for n in range(1, experts + 1) if experts % n == 0]
        near = [max(n for n in fitting if n < size), *[n for n in fitting if n > size][:1]]
        yield (
            f"{key} is {size}, but model.moe.num_experts {experts} / {size} leaves "
            f"{experts % size} over, and every rank has as many: take "
            f"{' or '.join(map(str, near))}"
        )
    if parallel.expert_dispatcher == "deepep" and config.train.precision == "fp32":
        yield (
            "parallel.expert_dispatcher is deepep, which sends bf16, but train.precision is fp32: "
            "set it to bf16 or bf16_params, or take exact"
        )
    replica, stages = parallel.model_parallel_size, parallel.pipeline_model_parallel_size
    if world_size and world_size % replica == 0 and (ranks := world_size // stages) % size:
        least = parallel.least_processes
        below = world_size - world_size % least
        yield (
            f"{key} is {size}, but {world_size} processes / {stages} pipeline stages = {ranks} "
            f"ranks of a stage, of which {size} at a time share the experts: start "
            f"{f'{below} or ' if below else ''}{below + least} processes, or change it"
        )


def _batch(config: RunConfig, world_size: int | None) -> Problems:
    train, replicas = config.train, data_parallel_size(config, world_size)
    at_once = train.micro_batch_size * replicas
    rest = train.global_batch_size % at_once
    if rest:
        below, above = train.global_batch_size - rest, train.global_batch_size + at_once - rest
        yield (
            f"train.global_batch_size {train.global_batch_size} is not divisible by {at_once} "
            f"(train.micro_batch_size {train.micro_batch_size} x {replicas} data-parallel "
            f"replicas): take {f'{below} or ' if below else ''}{above}"
        )


def _data(config: RunConfig) -> Problems:
    split, train = config.data.split, config.train
    if min(split) < 0 or split[0] == 0:
        yield (
            f"data.split is {list(split)}: the training share must be above 0, and the validation "
            "share at least 0"
        )
    elif train.eval_interval and split[1] == 0:
        yield (
            f"train.eval_interval is {train.eval_interval}, but data.split {list(split)} leaves "
            "nothing for validation: set it to 0, or give validation a share"
        )


def _reset(config: RunConfig) -> Problems:
    section = config.checkpoint
    if section.load is None and section.reset != type(section)().reset:
        yield (
            f"checkpoint.reset is {section.reset}, but it says what starts anew with "
            "checkpoint.load, which is not set: name a checkpoint there, or leave reset out"
        )


def _kinds(config: RunConfig, files: bool) -> Problems:
    """What every kind that the configuration names says of it."""
    for choice in CHOICES:
        for kind in kinds_of(config, choice):
            yield from kind.check(config)
            if files:
                yield from kind.check_files()
