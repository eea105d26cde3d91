"""`attnres-train import`: weights in the layout of the released Kimi-Linear as step 0 of a run.
About one file of weights is in memory at a time."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from attnres_train.checkpoint import folders
from attnres_train.checkpoint.huggingface import ReleasedWeights
from attnres_train.checkpoint.huggingface_config import check_same_model
from attnres_train.checkpoint.names import OPTIMIZER, training_state
from attnres_train.checkpoint.streaming import FILE_BYTES, save_streamed
from attnres_train.commands.export import count_of, released_layout
from attnres_train.config import check_config, load_config, save_config
from attnres_train.config.saved import load_saved
from attnres_train.config.schema import RunConfig
from attnres_train.errors import UserError
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.naming import released_tensors
from attnres_train.optim.build import build_optimizer
from attnres_train.run_state import Progress
from attnres_train.train import PARAMETER_DTYPE

_MASTER = f"{OPTIMIZER}master."
_DEPTH_READ = ("_res_proj.weight", "_res_norm.weight")


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
    depth_reads = [name for name in layout if name.endswith(_DEPTH_READ)]
    fresh = [] if any(name in weights.tensors for name in depth_reads) else depth_reads
    weights.check_fit({name: t for name, t in layout.items() if name not in set(fresh)})
    state = _training_state(config)
    path = save_streamed(
        run_folder / "checkpoints",
        0,
        state,
        lambda name: _value(name, state[name], weights),
        {"progress": vars(Progress()), "config": config.model_dump(mode="json")},
        keep_last=config.checkpoint.keep_last,
        file_bytes=file_bytes,
    )
    save_config(config, run_folder / "config.yaml")
    print(f"imported {count_of(layout)} of {folder} as {path}")
    if fresh:
        print(
            f"{len(fresh)} tensors of Attention Residuals are not there and start afresh, queries "
            "at zero: reads are means of the blocks then, not their sum as in the released model, "
            "which has to be trained to fit"
        )
    return 0


def _training_state(config: RunConfig) -> dict[str, Tensor]:
    """Everything a checkpoint of the run holds, on the meta device."""
    dtype = PARAMETER_DTYPE[config.train.precision]
    chunk = ModelChunk(config.model, 0, config.model.num_layers, device="meta", dtype=dtype)
    optimizer = build_optimizer(chunk.named_parameters(), config.optimizer, "meta")
    return training_state(chunk.state_dict().items(), optimizer, released_tensors)


def _value(name: str, tensor: Tensor, weights: ReleasedWeights) -> Tensor:
    """What ``tensor`` of the training state starts as."""
    weight = name.removeprefix(_MASTER)
    if weight in weights.tensors:
        return weights.read(weight).to(tensor.dtype).reshape(tensor.shape)
    fill = 1 if weight.endswith("_res_norm.weight") and not weight.startswith(OPTIMIZER) else 0
    return torch.full(tensor.shape, fill, dtype=tensor.dtype)


def _load_config(run: Path, overrides: list[str]) -> RunConfig:
    if not run.is_dir():
        config = load_config(run, overrides)
    else:
        config = load_saved(run / "config.yaml", overrides)
        config.run.dir, config.run.name = str(run.parent), run.name
    check_config(config, None)
    return config
