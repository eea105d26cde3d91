"""A model with its tokenizer, from a checkpoint of whatever layout: whole, or some layers of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from attnres_train.checkpoint import folders, store
from attnres_train.checkpoint.manifest import META, read_manifest
from attnres_train.checkpoint.names import OPTIMIZER, training_state
from attnres_train.config.saved import saved_config
from attnres_train.config.schema import RunConfig
from attnres_train.data.tokenizers.tokenizer import Tokenizer
from attnres_train.errors import UserError
from attnres_train.inference.saved_tokenizer import saved_tokenizer
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.moe.layer import router_loads
from attnres_train.model.naming import released_tensors
from attnres_train.model.ports import Ports
from attnres_train.model.precision import PARAMETER_DTYPE, STREAM_DTYPE, autocast_dtype
from attnres_train.parallel.ranks import Ranks, places_of


@dataclass(frozen=True)
class Opened:
    """``config`` as it was saved with the checkpoint (of its stage), ``chunk`` the whole model, in
    eval mode and without gradients, ``tokenizer`` the run's own (None: it has none), ``path`` the
    step folder of ``step``."""

    config: RunConfig
    chunk: ModelChunk
    tokenizer: Tokenizer | None
    step: int
    path: Path

    @property
    def device(self) -> torch.device:
        return self.chunk.norm.weight.device


def open_model(path: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> Opened:
    """The model in ``path``: a run folder (its newest checkpoint), or a step folder.

    ``device`` is ``cpu``, ``cuda``, ``cuda:1`` or ``auto`` (a GPU where there is one). ``dtype`` is
    that of parameters and of all arithmetic (KDA's decay at least fp32); None: as in training.

    Raises UserError where there is no checkpoint, no such device, where the run's tokenizer is
    gone, and where a file is damaged.
    """
    place, saved = choose(device), find_saved(path)
    tokenizer = saved.tokenizer()
    ports = Ports.of_one_process(saved.config.model)
    whole = range(saved.config.model.num_layers)
    (chunk,) = load_chunks(saved.config, saved.path, [whole], place, dtype, ports)
    return Opened(saved.config, chunk, tokenizer, saved.step, saved.path)


class Saved(NamedTuple):
    """A checkpoint that is found and not read yet, as in `Opened`; ``extras`` is what it holds
    beside tensors."""

    config: RunConfig
    step: int
    path: Path
    extras: Mapping[str, Any]

    def tokenizer(self) -> Tokenizer | None:
        """The run's own. Raises UserError where it is gone."""
        return saved_tokenizer(self.config, self.extras, self.path)


def find_saved(path: str | Path) -> Saved:
    """The newest checkpoint of a run folder, or the step folder ``path``. Raises UserError."""
    step_folder = folders.newest_in(Path(path))
    manifest = read_manifest(step_folder)
    if "config" not in manifest.extras:
        raise UserError(f"{step_folder} is no checkpoint of a run: it holds no configuration")
    config = saved_config(manifest.extras["config"], step_folder / META)
    return Saved(config, manifest.step, step_folder, manifest.extras)


def load_chunks(
    config: RunConfig,
    step_folder: Path,
    layers: Sequence[range],
    device: torch.device,
    dtype: torch.dtype | None,
    ports: Ports,
    ranks: Ranks | None = None,
) -> list[ModelChunk]:
    """Chunks of these ``layers`` of the model of ``config`` on ``device``, with the weights of
    ``step_folder``; ``dtype`` as for `open_model`. Collective over ``ranks``, which together have
    all layers and experts (None: they are here)."""
    precision = config.train.precision
    chunks = [
        ModelChunk(
            config.model,
            here.start,
            here.stop,
            stream_dtype=STREAM_DTYPE[precision] if dtype is None else None,
            autocast_dtype=autocast_dtype(precision) if dtype is None else None,
            device="meta",
            dtype=PARAMETER_DTYPE[precision],
            ports=ports,
        )
        for here in layers
    ]
    for chunk in chunks:
        chunk.to_empty(device=device)
        for load in router_loads(chunk):
            load.zero_()
        chunk.requires_grad_(False).eval()
    named = [item for chunk in chunks for item in chunk.state_dict().items()]
    places = {n: place for c in chunks for n, place in places_of(c, ranks)} if ranks else {}
    first_expert = ports.exchange.experts.start
    released = partial(released_tensors, first_expert=first_expert, places=places)
    state, group = training_state(named, None, released), ranks.control if ranks else None
    store.load(step_folder, state, unread=(OPTIMIZER,), group=group)
    if dtype is not None:
        for chunk in chunks:
            chunk.cast(dtype)
    return chunks


def choose(device: str) -> torch.device:
    """Raises UserError for a ``device`` that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise UserError(f"device {device}: it is cpu, cuda, cuda:1 (or another number) or auto")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device {device}: there is none here (GPUs that torch sees: "
            f"{torch.cuda.device_count()})"
        )
    return found
