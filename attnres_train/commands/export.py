"""`attnres-train export`: a run's weights in the layout of the released Kimi-Linear. About one file
of weights is in memory at a time."""

from __future__ import annotations

import argparse
import shutil
from functools import partial
from pathlib import Path

from torch import Tensor

from attnres_train.checkpoint import folders, store
from attnres_train.checkpoint.huggingface import released_dtype, write_weights
from attnres_train.checkpoint.huggingface_config import left_unsaid, released_config, write_config
from attnres_train.checkpoint.manifest import META, Manifest, read_manifest
from attnres_train.checkpoint.streaming import FILE_BYTES
from attnres_train.config.model_schema import ModelConfig
from attnres_train.config.saved import saved_config
from attnres_train.errors import UserError
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.naming import released_tensors
from attnres_train.model.residual.kind import residual_kind


def run(args: argparse.Namespace) -> int:
    return export_weights(args.run_folder, args.target)


def export_weights(run: str, target: str, file_bytes: int = FILE_BYTES) -> int:
    """Write the newest checkpoint of ``run`` (run or step folder) to the new folder ``target``."""
    step_folder, folder = folders.newest_in(Path(run)), Path(target)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{target} exists already: name a new folder, or remove it")
    manifest = read_manifest(step_folder)
    config = saved_config(manifest.extras["config"], step_folder / META)
    kind = residual_kind(config.model)
    description = released_config(config.model, config.train.seq_length, kind.released())
    layout = released_layout(config.model)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    load = partial(_load, step_folder, manifest, layout)
    files = write_weights(unfinished, layout, load, file_bytes=file_bytes)
    write_config(unfinished, description)
    unfinished.rename(folder)
    for note in left_unsaid(config.model, kind.unsaid()):
        print(f"note: {note}")
    print(f"exported {count_of(layout)} of {step_folder} to {folder}, files: {files}")
    return 0


def released_layout(model: ModelConfig) -> dict[str, Tensor]:
    """Name, shape and dtype of every released tensor, in model order and on the meta device.

    Raises UserError for a residual that no released model has.
    """
    residual_kind(model).check_exchange()
    chunk = ModelChunk(model, 0, model.num_layers, device="meta")
    named = released_tensors(chunk.state_dict().items())
    return {name: tensor.to(released_dtype(name)) for name, tensor in named}


def _load(
    step_folder: Path, manifest: Manifest, layout: dict[str, Tensor], names: list[str]
) -> dict[str, Tensor]:
    """Tensors ``names`` of a checkpoint, in the dtypes of ``layout``."""
    saved = {name: manifest.tensors[name].empty() for name in names}
    store.load(step_folder, saved, unread=("",))
    # One by one, so that the two precisions of the whole file are never there together.
    return {name: saved.pop(name).to(layout[name].dtype) for name in names}


def count_of(layout: dict[str, Tensor]) -> str:
    """``N tensors, M elements,``."""
    elements = sum(tensor.numel() for tensor in layout.values())
    return f"{len(layout):,} tensors, {elements:,} elements,"
