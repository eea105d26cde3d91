"""Transports: asynchronous one-way tensor channels between the ranks of a pipeline.

`P2PTransport` runs on torch.distributed, gloo and NCCL alike; `MailboxTransport` connects engines
that share one process, so that a plan can be run and compared without any network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from threading import Condition
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from attnres_train.pipeline.plan.messages import Channel


class Work(Protocol):
    """A send or receive under way."""

    def is_completed(self) -> bool:
        """Whether it is known to be done. (gloo knows only after `wait`.)"""

    def wait(self) -> object:
        """Block until done: the process on CPU, the current stream on CUDA. Raises RuntimeError
        when the peer is lost or the timeout has passed."""


class Transport(Protocol):
    """Channels deliver tensors in the order in which they were sent."""

    bytes_sent: int
    """Bytes sent by this rank since the transport was made."""

    def send(self, channel: Channel, tensor: Tensor) -> Work:
        """Start to send ``tensor``, which must stay unchanged until the work is done."""

    def receive(self, channel: Channel, buffer: Tensor) -> Work:
        """Start to receive the channel's next tensor into ``buffer``."""


class _End(NamedTuple):
    """This rank's end of a channel: what `dist.isend` looks up anew at every call."""

    group: dist.ProcessGroup
    peer: int
    """The other rank's number within the group."""
    sends: bool


class P2PTransport:
    """Point-to-point operations, with a process group of its own for every channel.

    A communicator runs its operations in order, so whatever shares one can wait for each other: one
    group per pair of ranks, or per direction, deadlocks under NCCL. The groups are made here once,
    and each sends one element, so that no connection has to be opened during a step.

    Collective over all processes: ``channels`` (see `messages.channels`) and ``pipelines``, which
    lists the global ranks of every pipeline by stage, must be the same on each of them.
    """

    def __init__(
        self,
        channels: Sequence[Channel],
        pipelines: Sequence[Sequence[int]],
        timeout: timedelta,
        device: torch.device | str = "cpu",
    ) -> None:
        self._ends: dict[Channel, _End] = {}
        rank = dist.get_rank()
        # Also those that this process has no part in: to make a group takes all processes.
        for ranks in pipelines:
            for channel in channels:
                src, dst = ranks[channel.src_rank], ranks[channel.dst_rank]
                name = f"{channel.kind} {src} -> {dst}"  # told by NCCL's watchdog
                group = dist.new_group([src, dst], timeout=timeout, group_desc=name)
                if rank in (src, dst):
                    peer = dist.get_group_rank(group, dst if rank == src else src)
                    self._ends[channel] = _End(group, peer, sends=rank == src)
        self._connect(device)
        self.bytes_sent = 0

    def _connect(self, device: torch.device | str) -> None:
        """Send one element over every channel, in the same order on every rank: each waits for its
        peer at once, so any other order could deadlock."""
        self.bytes_sent = 0
        for channel, end in self._ends.items():
            start = self.send if end.sends else self.receive
            start(channel, torch.zeros(1, device=device)).wait()

    def send(self, channel: Channel, tensor: Tensor) -> Work:
        self.bytes_sent += tensor.nbytes
        end = self._ends[channel]
        return end.group.send([tensor], end.peer, 0)  # tag 0: a channel is told by its group

    def receive(self, channel: Channel, buffer: Tensor) -> Work:
        end = self._ends[channel]
        return end.group.recv([buffer], end.peer, 0)


class Mailboxes:
    """What the `MailboxTransport`s of one pipeline share; thread-safe. A channel's n-th tensor goes
    to its n-th receive."""

    def __init__(self, timeout: timedelta) -> None:
        self._timeout = timeout.total_seconds()
        self._tensors: dict[tuple[Channel, int], Tensor] = {}
        self._put: Counter[Channel] = Counter()
        self._reserved: Counter[Channel] = Counter()
        self._changed = Condition()
        self._closed = False

    def put(self, channel: Channel, tensor: Tensor) -> None:
        with self._changed:
            self._tensors[channel, self._put[channel]] = tensor
            self._put[channel] += 1
            self._changed.notify_all()

    def reserve(self, channel: Channel) -> tuple[Channel, int]:
        """A claim, for `take`, on the channel's next tensor that nobody has claimed. Like a wire,
        it fixes which tensor a receive gets when it is posted, not when it is waited for."""
        with self._changed:
            self._reserved[channel] += 1
            return channel, self._reserved[channel] - 1

    def take(self, claim: tuple[Channel, int]) -> Tensor:
        """Wait for the tensor; raises RuntimeError after the timeout or when closed."""
        with self._changed:
            if not self._changed.wait_for(
                lambda: claim in self._tensors or self._closed, self._timeout
            ):
                raise RuntimeError(f"nothing arrived on {claim[0]} in {self._timeout} s")
            if claim not in self._tensors:
                raise RuntimeError("a peer failed")
            return self._tensors.pop(claim)

    def close(self) -> None:
        """Make every waiting or later `take` of a missing tensor fail at once."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def is_empty(self) -> bool:
        return not self._tensors


class MailboxTransport:
    """One rank's end of `Mailboxes`. Sends a copy, as a wire does, and is done at once."""

    def __init__(self, mailboxes: Mailboxes) -> None:
        self.bytes_sent = 0
        self._mailboxes = mailboxes

    def send(self, channel: Channel, tensor: Tensor) -> Work:
        self.bytes_sent += tensor.nbytes
        self._mailboxes.put(channel, tensor.detach().clone())
        return _MailboxWork(None)

    def receive(self, channel: Channel, buffer: Tensor) -> Work:
        claim = self._mailboxes.reserve(channel)
        return _MailboxWork(lambda: buffer.copy_(self._mailboxes.take(claim)))


class _MailboxWork:
    """Work that ``finish`` ends; None: done."""

    def __init__(self, finish: Callable[[], object] | None) -> None:
        self._finish = finish

    def is_completed(self) -> bool:
        return self._finish is None

    def wait(self) -> None:
        if self._finish is not None:
            self._finish()
            self._finish = None
