"""The state of a run: how far it is, and how it is saved and resumed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from attnres_train.checkpoint import drift, folders, rng, store
from attnres_train.checkpoint.manifest import BrokenCheckpoint
from attnres_train.checkpoint.names import MASTER, OPTIMIZER, SavedOptimizer
from attnres_train.checkpoint.peers import Peers
from attnres_train.checkpoint.saver import Outcome, Saver
from attnres_train.config.loader import plain_values
from attnres_train.config.origin import has_begun
from attnres_train.config.schema import RunConfig
from attnres_train.config.stages import called
from attnres_train.data.prepare import Prepared
from attnres_train.errors import UserError
from attnres_train.model.chunk import ModelChunk
from attnres_train.parallel.ranks import Ranks
from attnres_train.pipeline.run.waits import PeerError
from attnres_train.runs import identity, run_folder, stages
from attnres_train.runs.progress import Progress
from attnres_train.runs.standing import Standing, standing
from attnres_train.screen import say
from attnres_train.training.named_state import by_holders, named_state

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 10.0
"""Time that a save under way has to be done once the run has failed."""


class Checkpoints:
    """Saves and resumes a run's state, every tensor under its layout-free name.

    ``config`` is that of the stage under way and ``prepared`` its data, ``folder`` the run folder,
    ``chunks`` and ``optimizer`` are those of this rank.
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
        self.tensors = named_state(chunks, optimizer, ranks)
        self.replicas = by_holders(self.tensors, chunks, ranks, config.optimizer.sharded)
        """The tensors by who holds the same."""
        self.prepared, self.files = prepared, files or {}
        self.record = identity.data_record(config, prepared)
        self.past: list[Mapping[str, Any]] = []
        """The records of the data of stages that are over."""
        self.loaded_from: Path | None = None
        self.newest: Path | None = None
        """The checkpoint that this attempt has saved last, or else begun with."""
        # Of its own, as a thread uses it while training goes on; and a save may take its time.
        timeout = timedelta(seconds=config.checkpoint.timeout_seconds)
        self.group = dist.new_group(backend="gloo", timeout=timeout)
        self._saver: Saver | None = None

    def resume(self) -> Progress:
        """Load what `checkpoint.resume` or `checkpoint.load` asks for, into chunks and optimizer,
        in place, and write into the run folder what the run is. Collective; raises UserError where
        it is not to be had, does not fit or is of another run (`identity.compare`)."""
        peers, progress = Peers(self.group), Progress()
        damaged: dict[Path, str] = {}
        found, told = self._found_and_loaded(peers, damaged)
        if found is not None:
            progress, self.past = self._position(found), list(found.extras.get("past", []))
            if self.ranks.is_main:
                verb = "weights of" if found.is_new else "resumed from"
                say("\n".join([f"{verb} {found.path}", *told]))
        # Only now: an attempt that cannot resume leaves the folder as it was.
        self.loaded_from = peers.on_first(lambda: self._begin(found, progress, damaged))
        self.newest = self.loaded_from
        return progress

    def _found_and_loaded(
        self, peers: Peers, damaged: dict[Path, str]
    ) -> tuple[Standing | None, list[str]]:
        """The newest checkpoint that is not damaged, loaded; what is found damaged on the way goes
        into ``damaged``."""
        while True:
            # On one rank: another one may see a shared folder as it was.
            found, told, broken = peers.on_first(lambda: self._find(damaged))
            damaged.update(broken)
            if found is None:
                return None, told
            try:
                self._load(found)  # damage to it is found by all ranks together
                return found, told
            except BrokenCheckpoint as error:
                peers.on_first(partial(self._check_passing_over, found, error))
                problem = str(error).removeprefix(f"{found.path} is damaged: ")
                damaged[found.path] = problem.removeprefix(f"{found.path}: ")

    def _refuse_stage(self, found: Standing, damaged: Mapping[Path, str]) -> None:
        """Raise UserError: the newest checkpoint that is whole is of an earlier stage, the data of
        which are not at hand."""
        told = "; ".join(
            f"damaged, kept as {folders.set_aside(place)}: {problem}"
            for place, problem in damaged.items()
        )
        raise UserError(
            f"{told}\nThe one before, {found.path}, is of {called(self.config, found.stage)}: give "
            "the same command again to go on there"
        )

    def _check_passing_over(self, found: Standing, error: BrokenCheckpoint) -> None:
        """Raise ``error``, with what there is instead, unless an older one is to be used."""
        resume = self.config.checkpoint.resume
        goes_on = resume == "auto" or has_begun(self.run_folder, resume)
        own = found.path.parent == self.folder and goes_on and not found.is_new
        if own and self.config.checkpoint.on_damage == "use_older":
            return
        older = folders.older_than(found.path)
        advice = f"the one before it is {older}" if older else "there is none before it"
        raise BrokenCheckpoint(f"{error}\n{advice}") from error

    def _load(self, found: Standing) -> None:
        tensors = self.tensors
        unread: tuple[str, ...] = ()
        if found.is_new and "optimizer" in self.config.checkpoint.reset:
            # Masters are the weights, in the precision in which they are learnt.
            fresh = [n for n in tensors if n.startswith(OPTIMIZER) and not n.startswith(MASTER)]
            tensors, unread = {n: t for n, t in tensors.items() if n not in fresh}, (OPTIMIZER,)
        restored = store.load(found.path, tensors, unread=unread, group=self.group)
        if restored.rng is not None and not found.is_new:
            rng.set_rng_state(restored.rng)

    def _find(
        self, damaged: Mapping[Path, str]
    ) -> tuple[Standing | None, list[str], dict[Path, str]]:
        """The checkpoint, what is to be told of it, and newer ones of this run that are broken."""
        found = standing(self.config, damaged)
        if found is None:
            return None, [], {}
        path, extras, goes_on = found.path, found.extras, not found.is_new
        broken = {}
        if path.parent == self.folder and goes_on:
            broken = folders.broken_after(path, damaged)
        if broken and self.config.checkpoint.on_damage == "error":
            lines = "".join(f"\n  {place}: {problem}" for place, problem in broken.items())
            raise UserError(
                f"checkpoint.on_damage is error, and there is damage:{lines}\nThe one before is "
                f"{path}: it is used with checkpoint.on_damage=use_older"
            )
        if found.config != self.config:
            self._refuse_stage(found, {**damaged, **broken})
        with stages.problems_named(self.config, found.stage):
            told = identity.compare(self.config, path, extras, self.record, goes_on=goes_on)
        return found, told, broken

    def _position(self, found: Standing) -> Progress:
        progress = Progress.of(found.extras["progress"])
        if identity.begins_data_anew(self.config, found.extras, self.record):
            progress.samples = 0
        return progress

    def _begin(
        self, found: Standing | None, progress: Progress, damaged: Mapping[Path, str]
    ) -> Path | None:
        for place, problem in damaged.items():
            say(f"damaged, kept as {folders.set_aside(place)}: {problem}")
        told = []
        if found is not None:
            told = identity.data_history(self.config, found.extras, self.record)
            told = [*stages.told_beginning(self.config, found.extras["progress"]), *told]
        path = found.path if found and not found.is_new else None
        path = run_folder.begin(self.run_folder, self.config.checkpoint.resume, path)
        tokenizer = self.prepared.tokenizer_path
        run_folder.keep_identity(
            self.run_folder, progress.step, self.config, self._records(), tokenizer, told
        )
        run_folder.keep_files(self.run_folder, self.files)
        # Made here alone: where it is gone later on, a disk was unmounted.
        self.folder.mkdir(exist_ok=True)
        return path

    def _records(self) -> dict[str, Any]:
        return self.record | ({"past": self.past} if self.past else {})

    @property
    def saving(self) -> bool:
        """Whether a save is being written on this rank."""
        return self._saver is not None and self._saver.busy

    def start_save(self, progress: Progress) -> None:
        """Save all ranks' state after the current step; no other save is under way. Collective;
        returns when the state is copied: a thread writes it, `ended_save` says how that ended."""
        if self._saver is None:
            section = self.config.checkpoint
            keep = folders.Keep(section.keep_last, section.keep_every)
            self._saver = Saver(self.folder, self.tensors, keep=keep, group=self.group)
        extras = {
            "progress": progress.plain(),
            folders.KEEP_BEFORE: progress.spikes.before,
            "config": plain_values(self.config),
            "data": self.record,
            "past": self.past,
        }
        self._saver.start(progress.step, extras, self.loaded_from)

    def ended_save(self) -> Outcome | None:
        """Wait for the save under way, if there is one; how it ended, the same on all ranks."""
        outcome = self._saver.wait() if self._saver else None
        if outcome is not None and outcome.path is not None:
            self.newest = outcome.path
            if self.ranks.is_main:
                say(outcome.told())
        return outcome

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Should the context fail, give the save under way some seconds to be done: it is of a step
        before. Not where a peer is silent or gone: it will not be done."""
        try:
            yield
        except PeerError:
            raise
        except Exception:
            if self._saver and self._saver.settled(SETTLE_SECONDS):
                self.ended_save()
            raise

    def compare_replicas(self, step: int) -> None:
        """Tell where replicas of the model are not equal any more. Collective."""
        mine: dict[str, list[int]] = {}
        for group, tensors in self.replicas.items():
            found = drift.drifted(tensors, group, self.ranks.device)
            # Of those that hold the same, one has something to say.
            mine |= found if group.rank() == 0 else {}
        told = Peers(self.ranks.control).decide(mine, lambda all_: drift.told(all_, step))
        if told and self.ranks.is_main:
            logger.warning(told)
