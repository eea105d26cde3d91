"""Saves beside training: what is to be written is copied at once, a thread does the rest.

Every save goes through the same points on every rank: rank 0 makes a folder that has no final name
yet; each rank writes its files there and a list of them; rank 0 hears from all, sees all files,
writes `meta.json` and publishes the folder by one rename. A rank that fails says so, and all ranks
agree that this save was none.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch.distributed as dist
from torch import Tensor

from attnres_train.checkpoint.folders import Keep
from attnres_train.checkpoint.manifest import data_name, list_name, list_of
from attnres_train.checkpoint.peers import Peers
from attnres_train.checkpoint.publishing import Report, begin, publish
from attnres_train.checkpoint.rng import rng_state
from attnres_train.checkpoint.sealed import sync_folder, write_file
from attnres_train.checkpoint.sharing import share_of
from attnres_train.checkpoint.staging import HostBuffers
from attnres_train.checkpoint.tensor_file import checksum, lay_out, spec, write_tensors
from attnres_train.model.parts import is_part

Result = TypeVar("Result")
THREADS = max(1, min(4, (os.cpu_count() or 1) // 2))


class Outcome(NamedTuple):
    """What became of a save, the same on all ranks: where it is, or why it is not."""

    step: int
    path: Path | None
    problem: str | None = None

    def told(self) -> str:
        if self.path is not None:
            return f"saved {self.path}"
        return f"the checkpoint of step {self.step} could not be written: {self.problem}"


class Problem(NamedTuple):
    """Why something could not be done, in place of its result."""

    text: str


class _Job(NamedTuple):
    step: int
    extras: dict
    rng: dict[str, str]
    loaded_from: Path | None


class Saver:
    """Saves ``tensors``, this rank's state, into step folders of ``folder``, which exists.

    All ranks of ``group`` (CPU-capable, and used by nobody else meanwhile; None: all ranks) make
    the same calls. Names are layout-free, and say what a tensor is a part of (`model.parts`); what
    several ranks hold is written by one of them. One save is under way at a time. Raises
    ValueError, on all ranks, where parts do not make up whole tensors.
    """

    def __init__(
        self,
        folder: Path,
        tensors: dict[str, Tensor],
        *,
        keep: Keep,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.folder, self.keep, self.peers = folder, keep, Peers(group)
        specs = {name: spec(tensor) for name, tensor in tensors.items()}
        self._file = data_name(self.peers.rank)
        mine = share_of(specs, self.peers)
        self._layout = lay_out(self._file, {name: specs[name] for name in mine})
        self._tensors = [tensors[name] for name in self._layout.tensors]
        self._buffers: HostBuffers | None = None
        self._running: Future[Outcome] | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is being written on this rank."""
        return self._running is not None and not self._running.done()

    def start(self, step: int, extras: dict, loaded_from: Path | None) -> None:
        """Save the state as it is now. Returns once it is copied to host memory; nothing may be
        under way. ``extras`` is JSON, rank 0's counts; raises TypeError where it is not.
        """
        assert self._running is None, "wait for the save before"
        extras = json.loads(json.dumps(extras))  # as it is now
        if self._buffers is None:
            nbytes = sum(tensor.nbytes for tensor in self._tensors)
            on_device = any(tensor.is_cuda for tensor in self._tensors)
            self._buffers = HostBuffers(nbytes, pinned=on_device)
        self._buffers.fill(self._tensors)
        job, done = _Job(step, extras, rng_state(), loaded_from), Future[Outcome]()
        self._running = done
        # A daemon: a process that ends for another reason does not wait for its peers.
        threading.Thread(target=self._run, args=(job, done), name="save", daemon=True).start()

    def settled(self, seconds: float) -> bool:
        """Wait, but not longer than that, for the save under way. Whether it was made."""
        running = self._running
        if running is None:
            return False
        wait([running], seconds)
        return running.done() and running.exception() is None

    def wait(self) -> Outcome | None:
        """What became of the save under way, once it is over on this rank; None without one. Raises
        what a lost peer or one that is silent too long raises."""
        if self._running is None:
            return None
        try:
            return self._running.result()
        finally:
            self._running = None

    def _run(self, job: _Job, done: Future[Outcome]) -> None:
        try:
            done.set_result(self._save(job))
        except BaseException as error:
            done.set_exception(error)

    def _save(self, job: _Job) -> Outcome:
        peers = self.peers
        unfinished = peers.on_first(partial(self._tried, partial(begin, self.folder, job.step)))
        if isinstance(unfinished, Problem):
            return Outcome(job.step, None, unfinished.text)
        report = self._tried(partial(self._write, unfinished, job))
        path = peers.decide(report, partial(self._finish, unfinished, job))
        if isinstance(path, Problem):
            return Outcome(job.step, None, path.text)
        return Outcome(job.step, path)

    def _tried(self, action: Callable[[], Result]) -> Result | Problem:
        """All ranks go on to the next point together, whatever happens to one."""
        try:
            return action()
        except Exception as error:
            what = f"rank {self.peers.rank} on {socket.gethostname()}: {type(error).__name__}"
            return Problem(f"{what}: {error}"[:500])

    def _write(self, unfinished: Path, job: _Job) -> Report:
        """Write this rank's files, on the disk when it returns."""
        layout, sizes, layouts = self._layout, {}, {}
        checksums: dict[str, int] = {}
        if layout.tensors:
            assert self._buffers is not None
            with ThreadPoolExecutor(THREADS, "checksums") as threads:
                # Of what is copied, not of what is in the file: that is compared when it is read.
                found = threads.map(checksum, self._bytes_by_tensor())
                pieces = self._buffers.read(0, self._buffers.nbytes)
                write_tensors(unfinished / self._file, layout, pieces)
                checksums = dict(zip(layout.tensors, found, strict=True))
            layouts, sizes = {self._file: layout}, {self._file: layout.nbytes}
        text, name = list_of(layouts, checksums, job.rng), list_name(self.peers.rank)
        write_file(unfinished / name, text)
        sync_folder(unfinished)
        return Report.of(name, text, sizes, any(map(is_part, layout.tensors)))

    def _bytes_by_tensor(self) -> Iterator[Iterator[memoryview]]:
        assert self._buffers is not None
        offset = len(self._layout.header)
        for entry in self._layout.tensors.values():
            start = entry.start - offset
            yield self._buffers.read(start, start + entry.nbytes)

    def _finish(
        self, unfinished: Path, job: _Job, reports: list[Report | Problem]
    ) -> Path | Problem:
        failed = [report for report in reports if isinstance(report, Problem)]
        whole = [report for report in reports if isinstance(report, Report)]
        action = partial(
            publish, unfinished, job.step, job.extras, self.keep, job.loaded_from, whole
        )
        result = failed[0] if failed else self._tried(action)
        if isinstance(result, Problem):
            shutil.rmtree(unfinished, ignore_errors=True)
        return result
