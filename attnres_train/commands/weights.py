"""`attnres-train export` and `attnres-train import`: weights from a run to the layout of the
released Kimi-Linear, and back. Either holds about one file of weights in memory."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from attnres_train.checkpoint import folders, store
from attnres_train.checkpoint.huggingface import ReleasedWeights, released_dtype, write_weights
from attnres_train.checkpoint.huggingface_config import (
    check_same_model,
    left_unsaid,
    released_config,
    write_config,
)
from attnres_train.checkpoint.manifest import META, Manifest, read_manifest
from attnres_train.checkpoint.names import OPTIMIZER, training_state
from attnres_train.checkpoint.streaming import FILE_BYTES, save_streamed
from attnres_train.config import check_config, load_config, save_config
from attnres_train.config.model_schema import ModelConfig
from attnres_train.config.schema import RunConfig
from attnres_train.errors import UserError
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.naming import released_tensors
from attnres_train.optim.build import build_optimizer
from attnres_train.train import PARAMETER_DTYPE
from attnres_train.trainer import Progress

_MASTER = f"{OPTIMIZER}master."
_DEPTH_READ = ("_res_proj.weight", "_res_norm.weight")


def export_weights(run: str, target: str, file_bytes: int = FILE_BYTES) -> int:
    """Write the newest checkpoint of ``run`` (run or step folder) to the new folder ``target``."""
    step_folder, folder = _find_checkpoint(Path(run)), Path(target)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{target} exists already: name a new folder, or remove it")
    manifest = read_manifest(step_folder)
    config = RunConfig.model_validate(manifest.extras["config"])
    description = released_config(config.model, config.train.seq_length)
    layout = released_layout(config.model)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    load = partial(_load, step_folder, manifest, layout)
    files = write_weights(unfinished, layout, load, file_bytes=file_bytes)
    write_config(unfinished, description)
    unfinished.rename(folder)
    for note in left_unsaid(config.model):
        print(f"note: {note}")
    print(f"exported {_count(layout)} of {step_folder} to {folder}, files: {files}")
    return 0


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
    print(f"imported {_count(layout)} of {folder} as {path}")
    if fresh:
        print(
            f"{len(fresh)} tensors of Attention Residuals are not there and start afresh, queries "
            "at zero: reads are means of the blocks then, not their sum as in the released model, "
            "which has to be trained to fit"
        )
    return 0


def released_layout(model: ModelConfig) -> dict[str, Tensor]:
    """Name, shape and dtype of every released tensor, in model order and on the meta device.

    Raises UserError for a residual that no released model has.
    """
    residual = model.residual
    if residual.kind in ("dense_former", "mhc_lite") or residual.variations:
        key = (residual.variations or ["kind"])[0]
        raise UserError(
            f"model.residual.{key} is {str(getattr(residual, key)).lower()}, which released models "
            "do not know: only Attention Residuals as in the paper, or none, are exchanged"
        )
    chunk = ModelChunk(model, 0, model.num_layers, device="meta")
    named = released_tensors(chunk.state_dict().items())
    return {name: tensor.to(released_dtype(name)) for name, tensor in named}


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


def _load(
    step_folder: Path, manifest: Manifest, layout: dict[str, Tensor], names: list[str]
) -> dict[str, Tensor]:
    """Tensors ``names`` of a checkpoint, in the dtypes of ``layout``."""
    specs = {name: manifest.tensors[name] for name in names}
    saved = {n: torch.empty(s.shape, dtype=getattr(torch, s.dtype)) for n, s in specs.items()}
    store.load(step_folder, saved, unread=("",))
    # One by one, so that the two precisions of the whole file are never there together.
    return {name: saved.pop(name).to(layout[name].dtype) for name in names}


def _find_checkpoint(path: Path) -> Path:
    if (path / META).is_file():
        return path
    newest = folders.find_latest(path / "checkpoints") or folders.find_latest(path)
    if newest is None:
        raise UserError(f"{path} holds no complete checkpoint: name a run folder or a step folder")
    return newest


def _load_config(run: Path, overrides: list[str]) -> RunConfig:
    if not run.is_dir():
        config = load_config(run, overrides)
    else:
        config = load_config(run / "config.yaml", overrides)
        config.run.dir, config.run.name = str(run.parent), run.name
    check_config(config, None)
    return config


def _count(layout: dict[str, Tensor]) -> str:
    elements = sum(tensor.numel() for tensor in layout.values())
    return f"{len(layout):,} tensors, {elements:,} elements,"
