"""Where the processes of a run meet before they have process groups: a key-value store, in which
each leaves what the others need. Nothing of it depends on how long preparing takes, and whoever is
missing, or has failed, is named."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from attnres_train.errors import UserError
from attnres_train.parallel.addresses import check_master, choose_interface, listener
from attnres_train.parallel.launched import launched_world_size
from attnres_train.screen import complain
from attnres_train.words import some_of

PREFIX = "start"
"""Of a meeting's keys, in the store that is the whole run's."""
POLL_SECONDS = 0.1
# Of what is told at once: torch's store closes the connection of whoever sends it 8 MiB and more.
PIECE = 2**22
# Seconds between two lines that tell who is waited for.
TELL_SECONDS = 30.0
# Seconds that rank 0, in whose process the store may be, leaves the others to read why it fails.
LINGER_SECONDS = 1.0
# How the error of another rank begins where it is no user's: see `supervise.worker.PEER_LOST`.
PEER_FAILED = "remote process exited"


@dataclass
class Meeting:
    """One process's place in it. What is told must be what JSON can hold."""

    store: dist.Store
    rank: int
    world_size: int
    timeout: float
    """Seconds that `hear` and `hear_all` wait."""
    machine: str = field(default_factory=lambda: socket.gethostname())
    """This machine's name, which nobody needs to resolve."""
    local_rank: int = field(default_factory=lambda: int(os.environ.get("LOCAL_RANK", 0)))
    is_over: bool = False
    """Whether all know that all are well: what fails after that is not told here."""

    def tell(self, key: str, value: Any) -> None:
        """Leave ``value``, of whatever size, for `hear`."""
        for place, text in _entries(key, value).items():
            self.store.set(place, text)

    def tell_own(self, key: str, value: Any) -> None:
        """Leave this rank's ``value`` for `hear_all`."""
        self.tell(f"{key}/{self.rank}", value)

    def hear(self, key: str, doing: str) -> Any:
        """What another rank tells under ``key``, waiting for it. ``doing`` is for messages: what
        is waited for, as in "rank 0 to prepare the data".

        Raises UserError when it does not come in time, or another rank cannot start.
        """
        self._wait([key], lambda missing: doing)
        return self._told(key, self.store.get(key))

    def heard(self, key: str) -> Any:
        """What has been told under ``key``; None where nothing has."""
        return self._told(key, self.store.get(key)) if self.store.check([key]) else None

    def hear_all(self, key: str, doing: str, names: Sequence[str] = ()) -> list[Any]:
        """What every rank tells under ``key``, by rank; ``doing`` is what they do for it, as in
        "to join", and ``names`` are those of their machines. For rank 0: it prints whom it waits
        for. Raises UserError as `hear` does."""
        keys = [f"{key}/{rank}" for rank in range(self.world_size)]

        def waited_for(missing: list[int]) -> str:
            machines = dict.fromkeys(names[rank] for rank in missing) if names else ()
            on = f" on {some_of(machines)}" if machines else ""
            return f"{of_ranks(missing)}{on} {doing}"

        self._wait(keys, waited_for)
        return [
            self._told(key, text)
            for key, text in zip(keys, self.store.multi_get(keys), strict=True)
        ]

    def _told(self, key: str, text: bytes) -> Any:
        """The value whose entry under ``key`` is ``text``."""
        more, _, first = text.partition(b":")
        rest = (self.store.get(_piece(key, number)) for number in range(int(more)))
        return json.loads(b"".join((first, *rest)))

    def _wait(self, keys: list[str], waited_for: Callable[[list[int]], str]) -> None:
        started = told = time.monotonic()
        while not self.store.check(keys):
            if self.store.check(["failed"]):
                self._raise_failure()
            now = time.monotonic()
            if now - started > self.timeout:
                missing = [place for place, key in enumerate(keys) if not self.store.check([key])]
                raise UserError(
                    f"after {self.timeout:g} s on {self.machine}, still waiting for "
                    f"{waited_for(missing)}: run.start_timeout_seconds ends the wait"
                )
            if self.rank == 0 and now - told > TELL_SECONDS:
                told = now
                missing = [place for place, key in enumerate(keys) if not self.store.check([key])]
                complain(f"waiting for {waited_for(missing)}")
            time.sleep(POLL_SECONDS)

    def tell_failure(self, error: BaseException) -> None:
        """Let the others know that this rank cannot start, unless another was first."""
        is_users = isinstance(error, UserError)
        told = str(error) if is_users else f"{type(error).__name__}: {error}"
        mine = json.dumps([self.rank, self.machine, is_users, told])
        self.store.compare_set("failed", "", mine)
        if self.rank == 0 and self.world_size > 1:
            time.sleep(LINGER_SECONDS)

    def _raise_failure(self) -> None:
        rank, machine, is_users, told = json.loads(self.store.get("failed"))
        if is_users:
            raise UserError(told if rank == 0 else f"rank {rank} on {machine}: {told}")
        raise RuntimeError(f"{PEER_FAILED}: rank {rank} on {machine} failed: {told}")


def told_beforehand(key: str, value: Any) -> dict[str, str]:
    """What whoever has the store puts there for a process to have `heard` ``value``."""
    return _entries(f"{PREFIX}/{key}", value)


def _entries(key: str, value: Any) -> dict[str, str]:
    """What the store is to hold for ``value``: under ``key``, which comes last, its first piece and
    how many more there are."""
    text = json.dumps(value)
    first, *rest = (text[start : start + PIECE] for start in range(0, len(text), PIECE))
    pieces = {_piece(key, number): piece for number, piece in enumerate(rest)}
    return pieces | {key: f"{len(rest)}:{first}"}


def _piece(key: str, number: int) -> str:
    return f"{key}#{number}"


@contextmanager
def meet(timeout: float) -> Iterator[Meeting]:
    """Meet the run's other processes (torchrun's environment; alone without it), those that come
    within ``timeout`` seconds. What fails before the meeting `is_over` is told to all.

    Raises UserError where MASTER_ADDR leads nowhere.
    """
    world_size = launched_world_size()
    if world_size is None:
        yield Meeting(dist.HashStore(), 0, 1, timeout)
        return
    rank, address = int(os.environ["RANK"]), os.environ["MASTER_ADDR"]
    check_master(address)
    choose_interface(address)
    # Under torchrun the agent has the store, else rank 0.
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    port, serves = int(os.environ["MASTER_PORT"]), rank == 0 and not agents
    store = dist.TCPStore(
        address,
        port,
        is_master=serves,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,  # they are waited for by name
        master_listen_fd=listener(address, port) if serves else None,
    )
    meeting = Meeting(dist.PrefixStore(PREFIX, store), rank, world_size, timeout)
    try:
        yield meeting
    except BaseException as error:
        if not meeting.is_over:
            meeting.tell_failure(error)
        raise


def of_ranks(ranks: Sequence[int]) -> str:
    """``ranks`` in words: "ranks 0-7, 9"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    told = ["-".join(map(str, run)) for run in runs]
    return f"rank{'s' * (len(ranks) > 1)} {some_of(told)}"
