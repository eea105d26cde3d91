"""Messages: which tensors cross ranks around each action, in which order and on which channel.

Pure Python, from plan and schedule alone, so that sender and receiver agree without a handshake.
Forward, the blocks that a rank holds already leave before it computes a chunk (*held*), the blocks
that the chunk makes leave as they are complete, its partial after it (*fresh*). Backward mirrors
this: the gradient of the partial goes first, for the receiver cannot start without it, that of a
fresh block is due when the receiver's pass comes to where the block was made, and those of held
ones when it ends. So one channel for each directed edge and kind, used in the order of sending,
carries everything in the order in which it is due: nothing that a peer waits for queues up after
what it needs later. (Two connections would share the link evenly, and let history for the next pass
hold up what this one waits for.)
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from attnres_train.pipeline.plan.schedule import Action
from attnres_train.pipeline.plan.transport_plan import TransportPlan


class PipelineError(RuntimeError):
    """The pipeline broke one of its own rules; names pipeline rank, chunk, block, micro-batch."""


class Channel(NamedTuple):
    """An ordered one-way connection between two ranks."""

    src_rank: int
    dst_rank: int
    kind: Literal["F", "B"]


class Message(NamedTuple):
    """One tensor: a block or partial (``block`` is None), or its gradient, for ``action``."""

    channel: Channel
    action: Action
    block: int | None
    is_held: bool
    """Whether the sender of the block held it before its forward pass."""

    @property
    def key(self) -> tuple[int, int]:
        """(micro-batch, block), by which both ranks store the block; a partial has none."""
        assert self.block is not None
        return self.action.micro_batch, self.block

    @property
    def tensor(self) -> str:
        """What is sent, in words."""
        name = "the partial" if self.block is None else f"block {self.block}"
        return name if self.action.kind == "F" else f"the gradient of {name}"

    @property
    def made_by(self) -> Action:
        """The action of the sender around which it leaves."""
        step = 1 if self.action.kind == "F" else -1
        return self.action._replace(chunk=self.action.chunk - step)

    def __str__(self) -> str:
        return f"{self.tensor} for {self.action}"


def leaving(plan: TransportPlan, action: Action) -> tuple[Message, ...]:
    """What the rank of ``action`` sends around it, in order.

    F(chunk c): the tensors of the hop after c. B(chunk c): the gradients of the hop before c, in
    the reverse order, so that those that are fresh to the next receiver come first once more.
    """
    forward = action.kind == "F"
    hop = plan.hop_out_of(action.chunk) if forward else plan.hop_into(action.chunk)
    if hop is None or hop.is_local:
        return ()
    src, dst = (hop.src_rank, hop.dst_rank) if forward else (hop.dst_rank, hop.src_rank)
    receiver = action._replace(chunk=hop.dst_chunk if forward else hop.src_chunk)
    channel = Channel(src, dst, action.kind)
    messages = (
        *(Message(channel, receiver, block, True) for block in hop.held),
        *(Message(channel, receiver, block, False) for block in hop.fresh),
        *([Message(channel, receiver, None, False)] if hop.partial else ()),
    )
    # Reversed, the partial's gradient is first: without it the receiver's pass cannot start.
    return messages if forward else messages[::-1]


def arriving(plan: TransportPlan, action: Action) -> tuple[Message, ...]:
    """What ``action`` receives, in the order in which it is sent."""
    chunk = action.chunk - 1 if action.kind == "F" else action.chunk + 1
    if not 0 <= chunk < plan.layout.num_chunks:
        return ()
    return leaving(plan, action._replace(chunk=chunk))


def channels(plan: TransportPlan) -> list[Channel]:
    """Every channel that some hop of ``plan`` uses, in the same order on every rank."""
    chunks = range(plan.layout.num_chunks)
    actions = [Action(kind, chunk, 0) for kind in ("F", "B") for chunk in chunks]
    return sorted({message.channel for action in actions for message in leaving(plan, action)})
