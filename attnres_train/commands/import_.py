"""`attnres-train import`: weights in the layout of the released Kimi-Linear as step 0 of a run.
About one file of weights is in memory at a time."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from attnres_train.checkpoint import folders
from attnres_train.checkpoint.huggingface import ReleasedWeights
from attnres_train.checkpoint.huggingface_config import check_same_model
from attnres_train.checkpoint.names import MASTER, training_state
from attnres_train.checkpoint.streaming import FILE_BYTES, save_streamed
from attnres_train.commands.export import count_of, released_layout
from attnres_train.config import check_config, load_config, save_config
from attnres_train.config.loader import plain_values
from attnres_train.config.saved import load_saved
from attnres_train.config.schema import RunConfig
from attnres_train.errors import UserError
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.init import initial_value
from attnres_train.model.naming import released_tensors
from attnres_train.model.parameters import ParameterRule, parameter_rules
from attnres_train.model.precision import PARAMETER_DTYPE
from attnres_train.model.residual.kind import residual_kind
from attnres_train.optim.build import build_optimizer
from attnres_train.runs.progress import Progress


def run(args: argparse.Namespace) -> int:
    return import_weights(args.source, args.config, args.overrides)


def import_weights(
    folder: str, run: str, overrides: list[str], file_bytes: int = FILE_BYTES
) -> int:
    """Make ``folder``'s weights step 0 of ``run``, a YAML file or a run folder with its
    ``config.yaml``: with fresh optimizer state, for `attnres-train train` to resume from."""
    config = _load_config(Path(run), overrides)
    run_folder = Path(config.run.dir) / config.run.name
    if folders.scan(run_folder / "checkpoints"):
        raise UserError(f"{run_folder} has checkpoints already: choose another run.name")
    check_same_model(Path(folder), config.model)
    weights, layout = ReleasedWeights(Path(folder)), released_layout(config.model)
    chunk = _chunk_on_meta(config)
    reads = _rules_of_reads(chunk)
    fresh = {} if any(name in weights.tensors for name in reads) else reads
    weights.check_fit({name: tensor for name, tensor in layout.items() if name not in fresh})
    start = Start(weights, fresh, config)
    state = _training_state(chunk, config)
    path = save_streamed(
        run_folder / "checkpoints",
        0,
        state,
        lambda name: start.value(name, state[name]),
        {"progress": Progress().plain(), "config": plain_values(config)},
        keep_last=config.checkpoint.keep_last,
        file_bytes=file_bytes,
    )
    save_config(config, run_folder / "config.yaml")
    print(f"imported {count_of(layout)} of {folder} as {path}")
    if fresh:
        print(f"{len(fresh)} tensors of {residual_kind(config.model).started_afresh()}")
    return 0


def _chunk_on_meta(config: RunConfig) -> ModelChunk:
    """The whole model."""
    dtype = PARAMETER_DTYPE[config.train.precision]
    return ModelChunk(config.model, 0, config.model.num_layers, device="meta", dtype=dtype)


def _rules_of_reads(chunk: ModelChunk) -> dict[str, ParameterRule]:
    """Rules of what the reads of the residual stream learn, by released name."""
    named = dict(chunk.named_parameters())
    return {
        released: rule
        for name, rule in chunk.read_rules().items()
        for released, _ in released_tensors([(name, named[name])])
    }


def _training_state(chunk: ModelChunk, config: RunConfig) -> dict[str, Tensor]:
    """Everything a checkpoint of the run holds, on the meta device."""
    rules = parameter_rules(chunk)
    optimizer = build_optimizer(chunk.named_parameters(), rules, config.optimizer, "meta")
    return training_state(chunk.state_dict().items(), optimizer, released_tensors)


class Start(NamedTuple):
    """Where the tensors of step 0 come from: ``weights``, the rules of ``fresh`` ones by released
    name; all others are zero."""

    weights: ReleasedWeights
    fresh: dict[str, ParameterRule]
    config: RunConfig

    def value(self, name: str, tensor: Tensor) -> Tensor:
        """What ``tensor`` of the training state starts as."""
        weight = name.removeprefix(MASTER)
        if weight in self.weights.tensors:
            return self.weights.read(weight).to(tensor.dtype).reshape(tensor.shape)
        if weight in self.fresh:
            seed = self.config.run.seed
            value = initial_value(self.fresh[weight], weight, tensor.shape, seed)
            # A master is a copy of the parameter, in the parameter's precision.
            return value.to(PARAMETER_DTYPE[self.config.train.precision]).to(tensor.dtype)
        return torch.zeros(tensor.shape, dtype=tensor.dtype)


def _load_config(run: Path, overrides: list[str]) -> RunConfig:
    if not run.is_dir():
        config = load_config(run, overrides)
    else:
        for override in overrides:
            if override.partition("=")[0].strip() in ("run.name", "run.dir"):
                raise UserError(
                    f"{override}: {run} is a run folder, which has a name: leave it out, or name "
                    f"its config, {run / 'config.yaml'}, instead of the folder"
                )
        config = load_saved(run / "config.yaml", overrides)
        config.run.dir, config.run.name = str(run.parent), run.name
    check_config(config, None, files=False)
    return config
