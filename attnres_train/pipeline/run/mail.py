"""Inbox and outbox of a rank for one pass: buffers, order and lifetime of what is on the wire.

Shapes: every tensor is [B, S, D], B samples of its micro-batch and S tokens of each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from attnres_train.pipeline.plan.messages import Message, PipelineError
from attnres_train.pipeline.run.transport import Transport, Work
from attnres_train.pipeline.run.waits import PeerError, Wait


def identity(message: Message) -> Tensor:
    """What travels beside a tensor in debug mode: int64 [block (-1: partial), micro-batch, chunk],
    the chunk being the receiver's."""
    block = -1 if message.block is None else message.block
    return torch.tensor([block, message.action.micro_batch, message.action.chunk])


@dataclass
class _Receipt:
    buffer: Tensor
    work: Work
    identity: tuple[Tensor, Work] | None
    """In debug mode, to be received first."""
    since: float


class Inbox:
    """Receives each message into a buffer of its own; ``make_buffer(message)`` returns an empty
    [B, S, D]."""

    def __init__(
        self,
        rank: int,
        transport: Transport,
        make_buffer: Callable[[Message], Tensor],
        debug: bool,
    ) -> None:
        self._rank, self._transport, self._debug = rank, transport, debug
        self._make_buffer = make_buffer
        self._posted: dict[Message, _Receipt] = {}
        self.waited = 0.0
        """Seconds that the process was held up here. (On CUDA the stream waits instead.)"""

    def post(self, message: Message) -> None:
        """Start to receive ``message``, the next one that is sent on its channel."""
        buffer = self._make_buffer(message)
        tag = None
        with _peer_errors(self._rank, message, buffer):
            if self._debug:
                # -2: neither a block nor the partial (-1), should nothing be written.
                found = identity(message).fill_(-2).to(buffer.device)
                tag = found, self._transport.receive(message.channel, found)
            work = self._transport.receive(message.channel, buffer)
        self._posted[message] = _Receipt(buffer, work, tag, time.time())

    def take(self, message: Message) -> Tensor:
        """The tensor of ``message``, which was posted, waited for.

        Raises PeerError if it does not come, in debug mode PipelineError if it is another tensor.
        """
        receipt, started = self._posted.pop(message), time.perf_counter()
        with _peer_errors(self._rank, message, receipt.buffer):
            if receipt.identity is not None:
                found, work = receipt.identity
                work.wait()
                self._check_identity(message, found)
            receipt.work.wait()
        self.waited += time.perf_counter() - started
        return receipt.buffer

    def pending(self) -> list[Wait]:
        """What was posted and has not been taken, since when."""
        return [
            Wait.of(message, self._rank, receipt.buffer.nbytes, receipt.since)
            for message, receipt in self._posted.items()
        ]

    def _check_identity(self, message: Message, found: Tensor) -> None:
        block, micro_batch, chunk = found.tolist()
        if found.tolist() != identity(message).tolist():
            tensor = "the partial" if block == -1 else f"block {block}"
            raise PipelineError(
                f"pipeline rank {self._rank}: rank {message.channel.src_rank} sent {tensor} of "
                f"micro-batch {micro_batch} for chunk {chunk} in the place of {message}"
            )

    def assert_empty(self) -> None:
        """Raise PipelineError if a message was left unread at the end of the pass."""
        for message in self._posted:
            raise PipelineError(f"pipeline rank {self._rank}: {message} was never read")


@dataclass
class _Sending:
    message: Message
    tensors: tuple[Tensor, ...]
    works: tuple[Work, ...]
    due: int
    since: float


class Outbox:
    """Sends, and keeps each tensor until it is gone.

    ``due`` is the slot (see `program.start_slots`) after which the receiver must have taken the
    tensor; then it is waited for, since gloo reports the end of a send only to `wait`.
    """

    def __init__(self, rank: int, transport: Transport, dtype: torch.dtype, debug: bool) -> None:
        self._rank, self._transport, self._dtype, self._debug = rank, transport, dtype, debug
        self._pending: list[_Sending] = []
        self.waited = 0.0
        """As the inbox's."""

    def send(self, message: Message, tensor: Tensor, due: int) -> None:
        """Start to send ``tensor`` (of the stream's dtype, else PipelineError)."""
        # The receiver has made its buffer before; no size or type travels with a tensor.
        if tensor.dtype != self._dtype:
            raise PipelineError(
                f"pipeline rank {self._rank}: {message} is {tensor.dtype}, but the stream is "
                f"{self._dtype}"
            )
        tensors: tuple[Tensor, ...] = (tensor.detach().contiguous(),)
        if self._debug:
            tensors = (identity(message).to(tensor.device), *tensors)
        with _peer_errors(self._rank, message, tensor):
            works = tuple(self._transport.send(message.channel, t) for t in tensors)
        self._pending.append(_Sending(message, tensors, works, due, time.time()))

    def reap(self, slot: int) -> None:
        """Let go of the sends that are done or, at ``slot``, overdue."""
        for sending in list(self._pending):
            if sending.due < slot:  # no deadlock: its receive is posted in a lower slot
                self._finish(sending)
            elif sending.works[-1].is_completed():  # a channel delivers in order
                self._pending.remove(sending)

    def flush(self) -> None:
        """Wait for every send."""
        for sending in list(self._pending):
            self._finish(sending)

    def pending(self) -> list[Wait]:
        """What has been sent and is not known to be gone, since when."""
        return [
            Wait.of(s.message, self._rank, s.tensors[-1].nbytes, s.since) for s in self._pending
        ]

    def _finish(self, sending: _Sending) -> None:
        self._pending.remove(sending)
        started = time.perf_counter()
        with _peer_errors(self._rank, sending.message, sending.tensors[-1]):
            for work in sending.works:
                work.wait()
        self.waited += time.perf_counter() - started


@contextmanager
def _peer_errors(rank: int, message: Message, tensor: Tensor) -> Iterator[None]:
    """Tell of what the transport raises as a wait of ``rank`` for ``message``."""
    started = time.time()
    try:
        yield
    except PipelineError:  # a RuntimeError, too, but this rank's own
        raise
    except RuntimeError as error:
        raise PeerError(rank, Wait.of(message, rank, tensor.nbytes, started)) from error
