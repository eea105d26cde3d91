"""Block store: each block of each micro-batch once per rank, with its gradient.

A block is a leaf of the autograd graph, [B, S, D], that shares storage with the tensor that was
received or produced. Chunks read the leaf, so their backward passes accumulate in its ``.grad``;
gradients that peers return are added to the same tensor. It lives from the forward pass that brings
it to the rank until the backward pass of the same chunk, which is its last reader here.
"""

from __future__ import annotations

from collections import Counter

from torch import Tensor

from attnres_train.pipeline.plan.messages import PipelineError
from attnres_train.pipeline.plan.transport_plan import TransportPlan


class BlockStore:
    """The blocks on ``rank`` during one pass; ``training`` False keeps no gradients.

    Every method raises PipelineError, naming rank, chunk, block and micro-batch, when the plan is
    broken: a block that comes twice or is missing, or one that is released without exactly the
    gradient deposits that the plan foresees.
    """

    def __init__(self, plan: TransportPlan, rank: int, training: bool) -> None:
        self._plan, self._rank, self._training = plan, rank, training
        self._leaves: dict[tuple[int, int], Tensor] = {}
        # Not kept with the leaves: a gradient that comes when its block has gone is to be found.
        self._deposits: Counter[tuple[int, int]] = Counter()
        self._bytes = 0
        self.peak_blocks = 0
        self.peak_bytes = 0

    def put(self, micro_batch: int, block: int, tensor: Tensor) -> None:
        """Keep ``tensor`` (detached, without copying it) as ``block``."""
        key = micro_batch, block
        if key in self._leaves:
            raise self._error(key, "is delivered although it is held already")
        leaf = tensor.detach()
        if self._training:
            leaf.requires_grad_()
            # Called once per backward pass that comes to the leaf, however often it was read there.
            deposits = self._deposits  # not self: leaf and store would keep each other alive
            leaf.register_post_accumulate_grad_hook(lambda _: deposits.update((key,)))
        self._leaves[key] = leaf
        self._bytes += _memory(leaf)
        self.peak_blocks = max(self.peak_blocks, len(self._leaves))
        self.peak_bytes = max(self.peak_bytes, self._bytes)

    def holds(self, micro_batch: int, block: int) -> bool:
        return (micro_batch, block) in self._leaves

    def leaf(self, micro_batch: int, block: int) -> Tensor:
        """The block, to be read by a chunk or sent on."""
        leaf = self._leaves.get((micro_batch, block))
        if leaf is None:
            raise self._error((micro_batch, block), "is not held")
        return leaf

    def deposit(self, micro_batch: int, block: int, gradient: Tensor) -> None:
        """Add the gradient that a peer returns; takes ``gradient`` over."""
        leaf = self.leaf(micro_batch, block)
        # Without autograd, hence without the hook: counted here.
        if leaf.grad is None:
            leaf.grad = gradient
        else:
            leaf.grad += gradient
        self._deposits[micro_batch, block] += 1

    def release(self, micro_batch: int, block: int) -> Tensor | None:
        """Forget the block and return its gradient; None for a block that nobody reads."""
        key = micro_batch, block
        gradient = self.leaf(micro_batch, block).grad
        # A gradient that is lost or added twice raises nothing by itself: training would go on,
        # with wrong numbers. The count is the proof that this one is whole.
        expected = self._plan.expected_deposits(self._rank, block)
        if (found := self._deposits.pop(key, 0)) != expected:
            raise self._error(key, f"is released with {found} gradient deposits, not {expected}")
        self._bytes -= _memory(self._leaves.pop(key))
        return gradient

    def forget(self, micro_batch: int) -> None:
        """Drop a micro-batch's blocks without gradients, at the end of a forward-only pass."""
        for key in [key for key in self._leaves if key[0] == micro_batch]:
            self._bytes -= _memory(self._leaves.pop(key))

    def assert_empty(self) -> None:
        """Raise PipelineError if a block or a gradient outlives the step."""
        for key in self._leaves:
            raise self._error(key, "is still held at the end of the step")
        for key in self._deposits:
            raise self._error(key, "got a gradient after its release")

    def _error(self, key: tuple[int, int], what: str) -> PipelineError:
        micro_batch, block = key
        chunk = self._plan.bring.get((self._rank, block))
        origin = "no chunk" if chunk is None else f"chunk {chunk}"
        return PipelineError(
            f"pipeline rank {self._rank}: block {block} of micro-batch {micro_batch}, which "
            f"{origin} brings to this rank, {what}"
        )


def _memory(tensor: Tensor) -> int:
    """The bytes that ``tensor`` keeps alive: more than its own if it is a view of a larger one."""
    return tensor.untyped_storage().nbytes()
