"""A simulated network port: the sending side of one rank (see `simulate`)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from attnres_train.pipeline.schedule import Action


@dataclass
class Message:
    """Tensors on their way to rank ``dst``, for its pass ``enables``."""

    dst: int
    enables: Action
    urgent: bool
    """Waited for by that pass's start, or of either kind when sent in one piece."""
    units: int


class Transfer(NamedTuple):
    """A stretch of a message's units through the port of rank ``src``; times in seconds."""

    src: int
    dst: int
    enables: Action
    urgent: bool
    units: int
    start: float
    end: float


class Port:
    """Sends one unit at a time: urgent messages first, each kind in the order it came.

    ``at(time, event)`` schedules a call of ``event(time)``; ``delivered(transfer)`` is called as a
    stretch of units ends.
    """

    def __init__(
        self,
        rank: int,
        unit_seconds: float,
        at: Callable[[float, Callable[[float], None]], None],
        delivered: Callable[[Transfer], None],
    ) -> None:
        self.rank, self.unit_seconds, self.at, self.delivered = rank, unit_seconds, at, delivered
        self.urgent: deque[Message] = deque()
        self.relaxed: deque[Message] = deque()
        self.current: Message | None = None
        self.started = self.ends = 0.0

    def send(self, message: Message, now: float) -> None:
        (self.urgent if message.urgent else self.relaxed).append(message)
        if self.current is None:
            self._next(now)
        elif message.urgent and not self.current.urgent:
            self._interrupt(self.current, now)

    def _next(self, now: float) -> None:
        queue = self.urgent or self.relaxed
        self.current = queue.popleft() if queue else None
        if self.current:
            self.started = now
            self._complete_at(now + self.current.units * self.unit_seconds)

    def _interrupt(self, message: Message, now: float) -> None:
        """Let the unit on the wire pass; the rest of its message goes back to the queue's head."""
        if now >= self.ends:
            return
        sent = min(message.units, int((now - self.started) / self.unit_seconds) + 1)
        if sent < message.units:
            rest = Message(message.dst, message.enables, False, message.units - sent)
            self.relaxed.appendleft(rest)
            message.units = sent
            self._complete_at(self.started + sent * self.unit_seconds)

    def _complete_at(self, time: float) -> None:
        self.ends = time
        self.at(time, self._complete)

    def _complete(self, now: float) -> None:
        message = self.current
        if message is None or now != self.ends:
            return  # the end before an interruption
        self.current = None
        self.delivered(
            Transfer(
                self.rank,
                message.dst,
                message.enables,
                message.urgent,
                message.units,
                self.started,
                now,
            )
        )
        if self.current is None:
            self._next(now)
