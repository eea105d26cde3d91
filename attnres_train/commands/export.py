"""`attnres-train export`: a run's weights in the layout of the released Kimi-Linear, in a folder
that opens by itself. About one file of weights is in memory at a time."""

from __future__ import annotations

import argparse
import shutil
from functools import partial
from pathlib import Path

from torch import Tensor

from attnres_train.checkpoint import folders, store
from attnres_train.checkpoint.huggingface import released_dtype, write_weights
from attnres_train.checkpoint.huggingface_config import left_unsaid, released_config, write_config
from attnres_train.checkpoint.huggingface_opening import (
    opening_config,
    read_otherwise,
    write_opening,
)
from attnres_train.checkpoint.manifest import META, Manifest, read_manifest
from attnres_train.checkpoint.streaming import FILE_BYTES
from attnres_train.config.model_schema import ModelConfig
from attnres_train.config.saved import saved_config
from attnres_train.config.schema import RunConfig
from attnres_train.data.tokenizers.released import write_tokenizer
from attnres_train.data.tokenizers.tokenizer import Tokenizer
from attnres_train.errors import UserError
from attnres_train.inference.saved_tokenizer import saved_tokenizer
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
    residual = kind.released()
    description = released_config(config.model, config.train.seq_length, residual)
    layout = released_layout(config.model)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    load = partial(_load, step_folder, manifest, layout)
    files = write_weights(unfinished, layout, load, file_bytes=file_bytes)
    tokenizer, notes = _tokenizer(config, manifest, step_folder)
    eod = tokenizer.eod if tokenizer else None
    if tokenizer:
        notes += write_tokenizer(tokenizer, unfinished, config.train.seq_length)
    write_config(unfinished, opening_config(description, residual, config.model, eod))
    write_opening(unfinished, residual, eod)
    unfinished.rename(folder)
    notes += [
        *read_otherwise(description, residual, config.model),
        *left_unsaid(config.model, kind.unsaid()),
    ]
    for note in notes:
        print(f"note: {note}")
    print(f"exported {count_of(layout)} of {step_folder} to {folder}, files: {files}")
    return 0


def _tokenizer(
    config: RunConfig, manifest: Manifest, step_folder: Path
) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer of a checkpoint, and what is to be told where there is none: weights are
    exported all the same."""
    try:
        found = saved_tokenizer(config, manifest.extras, step_folder)
    except UserError as error:
        return None, [f"no tokenizer files: {error}"]
    return found, [] if found else ["no tokenizer files: the run has no tokenizer"]


def released_layout(model: ModelConfig) -> dict[str, Tensor]:
    """Name, shape and dtype of every released tensor, in model order and on the meta device.

    Raises UserError for a residual, or gates on norms, that no released model has.
    """
    kind = residual_kind(model)
    kind.check_exchange()
    if model.residual.norm_gate_rank is not None:
        raise kind.unreleased("norm_gate_rank")
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
