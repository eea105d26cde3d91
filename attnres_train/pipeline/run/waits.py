"""Waits: tensors that a rank waits for, to come or to be taken."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from attnres_train.pipeline.plan.messages import Message


@dataclass(frozen=True)
class Wait:
    """A tensor that has not crossed yet, seen from one of its ends."""

    direction: Literal["receive", "send"]
    tensor: str
    """E.g. "block 3" or "the gradient of the partial"."""
    made_by: str
    """The pass that makes or passes on the tensor, e.g. "F(chunk 2, micro-batch 1)"."""
    needed_by: str
    """The pass that needs it, on the rank that receives it."""
    peer: int
    """The rank at the other end."""
    num_bytes: int
    since: float
    """Seconds since the epoch, for the waits of several ranks are compared."""

    @classmethod
    def of(cls, message: Message, rank: int, num_bytes: int, since: float) -> Wait:
        """What ``message`` is to ``rank``."""
        src, dst, _ = message.channel
        return cls(
            direction="receive" if rank == dst else "send",
            tensor=message.tensor,
            made_by=str(message.made_by),
            needed_by=str(message.action),
            peer=src if rank == dst else dst,
            num_bytes=num_bytes,
            since=since,
        )

    def __str__(self) -> str:
        where = f"from rank {self.peer} in {self.made_by}"
        if self.direction == "send":
            where = f"to rank {self.peer}"
        return f"{self.tensor} for {self.needed_by}, {self.num_bytes} bytes, {where}"


class PeerError(RuntimeError):
    """Another rank did not deliver, or did not take, a tensor in time. The fault itself is usually
    the peer's.

    ``wait`` is what rank ``rank`` of the pipeline waited for until it gave up, ``pending`` whatever
    else was under way then.
    """

    def __init__(self, rank: int, wait: Wait) -> None:
        super().__init__(rank, wait)
        self.rank, self.wait, self.seconds = rank, wait, time.time() - wait.since
        self.pending: list[Wait] = []

    def __str__(self) -> str:
        return (
            f"pipeline rank {self.rank} waited {self.seconds:.1f} s in vain: {self.wait} "
            f"({len(self.pending)} others were under way)"
        )
