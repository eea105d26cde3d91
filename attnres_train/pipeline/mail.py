"""Inbox and outbox of a rank for one pass: buffers, order and lifetime of what is on the wire.

Shapes: every tensor is [B, T, D], B and T those of its micro-batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnres_train.pipeline.messages import Message, PeerError, PipelineError
from attnres_train.pipeline.transport import Transport, Work


def identity(message: Message) -> Tensor:
    """What travels beside a tensor in debug mode: int64 [block (-1: partial), micro-batch, chunk],
    the chunk being the receiver's."""
    block = -1 if message.block is None else message.block
    return torch.tensor([block, message.action.micro_batch, message.action.chunk])


@dataclass
class _Receipt:
    buffer: Tensor
    work: Work
    identity: Tensor | None
    identity_work: Work | None
    since: float


class Inbox:
    """Receives each message into a buffer of its own; ``make_buffer(micro_batch)`` returns an empty
    [B, T, D]."""

    def __init__(
        self,
        rank: int,
        transport: Transport,
        make_buffer: Callable[[int], Tensor],
        debug: bool,
    ) -> None:
        self._rank, self._transport, self._debug = rank, transport, debug
        self._make_buffer = make_buffer
        self._posted: dict[Message, _Receipt] = {}

    def post(self, message: Message) -> None:
        """Start to receive ``message``, the next one that is sent on its channel."""
        buffer = self._make_buffer(message.action.micro_batch)
        tag = tag_work = None
        if self._debug:
            tag = identity(message).fill_(-2).to(buffer.device)
            tag_work = self._transport.receive(message.channel, tag)
        work = self._transport.receive(message.channel, buffer)
        self._posted[message] = _Receipt(buffer, work, tag, tag_work, time.monotonic())

    def take(self, message: Message) -> Tensor:
        """The tensor of ``message``, which was posted, waited for.

        Raises PeerError if it does not come, in debug mode PipelineError if it is another tensor.
        """
        receipt = self._posted[message]
        if receipt.identity is not None:
            self._wait(receipt.identity_work, message)
            self._check_identity(message, receipt.identity)
        self._wait(receipt.work, message)
        del self._posted[message]
        return receipt.buffer

    def _wait(self, work: Work, message: Message) -> None:
        started = time.monotonic()
        try:
            work.wait()
        except RuntimeError as error:
            raise PeerError(self._complaint(message, started)) from error

    def _check_identity(self, message: Message, found: Tensor) -> None:
        block, micro_batch, chunk = found.tolist()
        if found.tolist() != identity(message).tolist():
            tensor = "the partial" if block == -1 else f"block {block}"
            raise PipelineError(
                f"rank {self._rank}: rank {message.channel.src_rank} sent {tensor} of micro-batch "
                f"{micro_batch} for chunk {chunk} in the place of {message}"
            )

    def _complaint(self, message: Message, started: float) -> str:
        """What this rank was waiting for: action, peer, blocks, bytes, since when."""
        now = time.monotonic()
        receipt = self._posted[message]
        others = [str(other) for other in self._posted if other != message]
        return (
            f"rank {self._rank} could not start or finish {message.action}: it waited "
            f"{now - started:.1f} s (posted {now - receipt.since:.1f} s ago) for {message}, "
            f"{receipt.buffer.nbytes} bytes, from rank {message.channel.src_rank}; also "
            f"outstanding: {', '.join(others) or 'nothing'}"
        )

    def assert_empty(self) -> None:
        """Raise PipelineError if a message was left unread at the end of the pass."""
        for message in self._posted:
            raise PipelineError(f"rank {self._rank}: {message} was never read")


@dataclass
class _Sending:
    message: Message
    tensors: tuple[Tensor, ...]
    works: tuple[Work, ...]
    due: int


class Outbox:
    """Sends, and keeps each tensor until it is gone.

    ``due`` is the slot (see `program.start_slots`) behind which the receiver must have taken the
    tensor; then it is waited for, since gloo reports the end of a send only to `wait`.
    """

    def __init__(self, rank: int, transport: Transport, dtype: torch.dtype, debug: bool) -> None:
        self._rank, self._transport, self._dtype, self._debug = rank, transport, dtype, debug
        self._pending: list[_Sending] = []

    def send(self, message: Message, tensor: Tensor, due: int) -> None:
        """Start to send ``tensor`` (of the stream's dtype, else PipelineError)."""
        if tensor.dtype != self._dtype:
            raise PipelineError(
                f"rank {self._rank}: {message} is {tensor.dtype}, but the stream is {self._dtype}"
            )
        tensors = (tensor.detach().contiguous(),)
        if self._debug:
            tensors = (identity(message).to(tensor.device), *tensors)
        works = tuple(self._transport.send(message.channel, t) for t in tensors)
        self._pending.append(_Sending(message, tensors, works, due))

    def reap(self, slot: int) -> None:
        """Let go of the sends that are done or, at ``slot``, overdue."""
        pending = []
        for sending in self._pending:
            if sending.due < slot:
                self._finish(sending)
            elif not all(work.is_completed() for work in sending.works):
                pending.append(sending)
        self._pending = pending

    def flush(self) -> None:
        """Wait for every send."""
        for sending in self._pending:
            self._finish(sending)
        self._pending.clear()

    def _finish(self, sending: _Sending) -> None:
        started = time.monotonic()
        try:
            for work in sending.works:
                work.wait()
        except RuntimeError as error:
            channel = sending.message.channel
            raise PeerError(
                f"rank {self._rank}: rank {channel.dst_rank} did not take {sending.message} "
                f"({sending.tensors[-1].nbytes} bytes), waited for "
                f"{time.monotonic() - started:.1f} s"
            ) from error
