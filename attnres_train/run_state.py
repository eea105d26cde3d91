"""The state of a run: how far it is, and how it is saved and resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from attnres_train.checkpoint import folders, rng, store
from attnres_train.checkpoint.names import SavedOptimizer, training_state
from attnres_train.config.schema import RunConfig
from attnres_train.model.naming import released_tensors
from attnres_train.parallel.ranks import Ranks


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds beside tensors."""

    step: int = 0
    samples: int = 0
    tokens: int = 0


class Checkpoints:
    """Saves and resumes a run's state, every tensor under its layout-free name.

    ``folder`` is the run folder, ``chunks`` and ``optimizer`` are those of this rank.
    """

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        folder: Path,
        chunks: Sequence[nn.Module],
        optimizer: SavedOptimizer,
    ) -> None:
        self.config, self.ranks = config, ranks
        self.folder = folder / "checkpoints"
        named = [item for chunk in chunks for item in chunk.state_dict(keep_vars=True).items()]
        self.tensors = training_state(
            [(name, tensor.detach()) for name, tensor in named], optimizer, released_tensors
        )
        self.loaded_from: Path | None = None

    def resume(self) -> Progress:
        """Load what `checkpoint.resume` asks for, into chunks and optimizer, in place. Collective;
        raises UserError where it is not to be had or does not fit."""
        path = folders.resolve_resume(self.config.checkpoint.resume, self.folder)
        if path is None:
            return Progress()
        restored = store.load(path, self.tensors, group=self.ranks.control)
        if restored.rng is not None:
            rng.set_rng_state(restored.rng)
        if self.ranks.is_main:
            print(f"resumed from {path}", flush=True)
        self.loaded_from = path
        return Progress(**restored.extras["progress"])

    def save(self, progress: Progress) -> Path:
        """Publish a checkpoint of all ranks after the current step. Collective; returns its folder
        on every rank, raises RuntimeError where it cannot be written."""
        path = store.save(
            self.folder,
            progress.step,
            self.tensors,
            {"progress": vars(progress), "config": self.config.model_dump(mode="json")},
            keep_last=self.config.checkpoint.keep_last,
            loaded_from=self.loaded_from,
            group=self.ranks.control,
        )
        if self.ranks.is_main:
            print(f"saved {path}", flush=True)
        return path
