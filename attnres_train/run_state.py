"""The state of a run: how far it is, and how it is saved and resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from attnres_train import identity, run_folder
from attnres_train.checkpoint import folders, rng, store
from attnres_train.checkpoint.manifest import read_manifest
from attnres_train.checkpoint.names import MASTER, OPTIMIZER, SavedOptimizer, training_state
from attnres_train.checkpoint.peers import Peers
from attnres_train.config.loader import plain_values
from attnres_train.config.schema import RunConfig
from attnres_train.data.prepare import Prepared
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.naming import released_tensors
from attnres_train.parallel.ranks import Ranks
from attnres_train.screen import say


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds beside tensors."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    """Of the steps, those whose loss or gradient was not finite: nothing was learnt from them."""


@dataclass(frozen=True)
class Standing:
    """The checkpoint that a run is to go on from, and what it holds beside tensors."""

    path: Path
    extras: Mapping[str, Any]
    """Of a new run, ``progress`` is where that begins."""
    is_new: bool = False
    """Whether it is another run that begins with the weights of this one (`checkpoint.load`)."""


def standing(config: RunConfig) -> Standing | None:
    """Where ``config``'s run stands on disk; None: at the beginning.

    Raises UserError where what `checkpoint.resume` or `checkpoint.load` asks for is not to be had.
    """
    folder = Path(config.run.dir) / config.run.name
    path = folders.resolve_resume(config.checkpoint.resume, folder / "checkpoints")
    if path is not None:
        return Standing(path, read_manifest(path).extras)
    if config.checkpoint.load is None:
        return None
    path = folders.resolve_path("checkpoint.load", config.checkpoint.load, folder / "checkpoints")
    extras, reset = read_manifest(path).extras, config.checkpoint.reset
    start = Progress(**extras["progress"])
    if "schedule" in reset:
        start.step = start.tokens = 0
    if "data" in reset:
        start.samples = 0
    return Standing(path, extras | {"progress": vars(start)}, is_new=True)


def nothing_left(config: RunConfig) -> str | None:
    """Why there is nothing to train, and what to change; None if there is. Nothing is written.

    Raises UserError as `standing` does, and where the checkpoint is of another model.
    """
    found = standing(config)
    if found is None:
        return None
    identity.compare(config, found.path, found.extras, None, goes_on=not found.is_new)
    return identity.nothing_left(config, found.path, found.extras)


class Checkpoints:
    """Saves and resumes a run's state, every tensor under its layout-free name.

    ``folder`` is the run folder, ``chunks`` and ``optimizer`` are those of this rank, ``prepared``
    is the run's data.
    """

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        folder: Path,
        chunks: Sequence[ModelChunk],
        optimizer: SavedOptimizer,
        prepared: Prepared,
        files: Mapping[str, Sequence[Sequence[object]]] | None = None,
    ) -> None:
        """``files`` are the lists of the files of the corpora by digest, on the first rank."""
        self.config, self.ranks, self.run_folder = config, ranks, folder
        self.folder = folder / "checkpoints"
        named = [item for chunk in chunks for item in chunk.state_dict(keep_vars=True).items()]
        first_expert = next((c.ports.exchange.experts.start for c in chunks), 0)
        self.tensors = training_state(
            [(name, tensor.detach()) for name, tensor in named],
            optimizer,
            partial(released_tensors, first_expert=first_expert),
        )
        self.prepared, self.files = prepared, files or {}
        self.record = identity.data_record(config, prepared)
        self.loaded_from: Path | None = None

    def resume(self) -> Progress:
        """Load what `checkpoint.resume` or `checkpoint.load` asks for, into chunks and optimizer,
        in place, and write into the run folder what the run is. Collective; raises UserError where
        it is not to be had, does not fit or is of another run (`identity.compare`)."""
        peers, progress = Peers(self.ranks.control), Progress()
        # On one rank: another one may see a shared folder as it was.
        found, told = peers.on_first(self._find)
        if found is not None:
            self._load(found)
            progress = self._position(found)
            if self.ranks.is_main:
                verb = "weights of" if found.is_new else "resumed from"
                say("\n".join([f"{verb} {found.path}", *told]))
        # Only now: an attempt that cannot resume leaves the folder as it was.
        self.loaded_from = peers.on_first(lambda: self._begin(found, progress))
        return progress

    def _load(self, found: Standing) -> None:
        tensors = self.tensors
        unread: tuple[str, ...] = ()
        if found.is_new and "optimizer" in self.config.checkpoint.reset:
            # Masters are the weights, in the precision in which they are learnt.
            fresh = [n for n in tensors if n.startswith(OPTIMIZER) and not n.startswith(MASTER)]
            tensors, unread = {n: t for n, t in tensors.items() if n not in fresh}, (OPTIMIZER,)
        restored = store.load(found.path, tensors, unread=unread, group=self.ranks.control)
        if restored.rng is not None and not found.is_new:
            rng.set_rng_state(restored.rng)

    def _find(self) -> tuple[Standing | None, list[str]]:
        """The checkpoint, and what is to be told of it."""
        found = standing(self.config)
        if found is None:
            return None, []
        path, extras, goes_on = found.path, found.extras, not found.is_new
        return found, identity.compare(self.config, path, extras, self.record, goes_on=goes_on)

    def _position(self, found: Standing) -> Progress:
        progress = Progress(**found.extras["progress"])
        if identity.begins_data_anew(self.config, found.extras, self.record):
            progress.samples = 0
        return progress

    def _begin(self, found: Standing | None, progress: Progress) -> Path | None:
        told = []
        if found is not None:
            told = identity.data_history(self.config, found.extras, self.record)
        path = found.path if found and not found.is_new else None
        path = run_folder.begin(self.run_folder, self.config.checkpoint.resume, path)
        tokenizer = self.prepared.tokenizer_path
        run_folder.keep_identity(
            self.run_folder, progress.step, self.config, self.record, tokenizer, told
        )
        run_folder.keep_files(self.run_folder, self.files)
        return path

    def save(self, progress: Progress) -> Path:
        """Publish a checkpoint of all ranks after the current step. Collective; returns its folder
        on every rank, raises RuntimeError where it cannot be written."""
        path = store.save(
            self.folder,
            progress.step,
            self.tensors,
            {
                "progress": vars(progress),
                "config": plain_values(self.config),
                "data": self.record,
            },
            keep_last=self.config.checkpoint.keep_last,
            loaded_from=self.loaded_from,
            group=self.ranks.control,
        )
        if self.ranks.is_main:
            say(f"saved {path}")
        return path
