"""Execution: one run of a rank's program, forward and backward passes and what moves around them.

Blocks cross to the next rank before the chunk that passes them on is computed, those that it makes
as soon as they are complete (see `plan.program`). A backward pass starts from what the chunk
leaves behind: its partial with the gradient that came back, the loss with 1/M, the blocks that it
does not read itself with the gradient collected in the store. Those that it does read get what was
collected when the pass comes to where they were made, so that it need not wait for it before.

Shapes: M micro-batches.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from attnres_train.pipeline.plan.messages import Message, PipelineError
from attnres_train.pipeline.plan.program import Program, Step
from attnres_train.pipeline.run.mail import Inbox, Outbox
from attnres_train.pipeline.run.stage import Batch, ChunkOutput, Stage
from attnres_train.pipeline.run.store import BlockStore
from attnres_train.pipeline.run.waits import PeerError


@dataclass
class _Outputs:
    """Where the backward pass of a chunk starts. Edges hold the graph, not the tensors: a partial
    that has been sent is freed, though the backward pass may be many micro-batches away."""

    blocks: dict[int, GradientEdge | None]
    """Those that the chunk does not read itself."""
    partial: GradientEdge | None
    loss: GradientEdge | None
    loss_weight: Tensor | None


AroundLastBackward = Callable[[int], AbstractContextManager[object]]
"""Chunk -> what its last backward pass of a step is made in."""


class Execution:
    """One run of ``program`` over ``batches``, with its state. ``losses`` are those of the last
    chunk, scalars without graph."""

    def __init__(
        self,
        stage: Stage,
        program: Program,
        batches: Sequence[Batch],
        last_backward: AroundLastBackward = nullcontext,
    ) -> None:
        self.stage, self.program, self.batches = stage, program, batches
        self.last_backward = last_backward
        self.plan, self.training = stage.plan, program.training
        self.store = BlockStore(stage.plan, stage.rank, self.training)
        # A buffer for each message, of its micro-batch's shape: they may differ in length.
        self.inbox = Inbox(stage.rank, stage.transport, self._buffer, stage.debug)
        self.outbox = Outbox(stage.rank, stage.transport, stage.stream_dtype, stage.debug)
        self.partials: dict[tuple[int, int], Tensor] = {}
        """(chunk, micro-batch) -> the chunk's incoming partial, a leaf."""
        self.partial_gradients: dict[tuple[int, int], Tensor] = {}
        """(chunk, micro-batch) -> gradient of the chunk's outgoing partial."""
        self.outputs: dict[tuple[int, int], _Outputs] = {}
        self.returning: dict[tuple[int, int], Message] = {}
        """(micro-batch, block) -> its gradient's message, which the backward pass under way has not
        come to yet."""
        self.losses: list[Tensor] = []

    def _buffer(self, message: Message) -> Tensor:
        return self.stage.buffer(self.batches[message.action.micro_batch], message)

    def run(self) -> None:
        """Every action in order. Raises PeerError if a peer fails, PipelineError if a rule of the
        pipeline is broken or anything is left at the end."""
        try:
            for step in self.program.steps:
                self.stage.on_pass()
                for message in step.posted:
                    self.inbox.post(message)
                (self._forward if step.action.kind == "F" else self._backward)(step)
                # Without this every tensor that was sent would live to the end of the step.
                self.outbox.reap(step.slot)
            self.outbox.flush()
        except PeerError as error:
            error.pending = self.inbox.pending() + self.outbox.pending()
            raise
        self._assert_empty()

    def _forward(self, step: Step) -> None:
        _, chunk, micro_batch = step.action
        for message in step.before:
            if self.program.sends(message):
                self._send(message, self.store.leaf(*message.key))
            else:
                self._accept(message)
        sources = {block: self.store.leaf(micro_batch, block) for block in self.plan.reads(chunk)}
        # Stays in `partials`: the backward pass leaves the gradient to return in its ``.grad``.
        partial = self.partials.get((chunk, micro_batch))
        fresh = deque(step.inside)

        def put(block: int, tensor: Tensor) -> None:
            self.store.put(micro_batch, block, tensor)
            # Only the first: receives are posted in the plan's order, so sends have to keep it.
            if fresh and fresh[0].block == block:
                self._send(fresh.popleft(), tensor)

        output = self.stage.chunks[chunk](self.batches[micro_batch], sources, partial, put)
        self._check_output(step, output)
        # A chunk need not tell of its blocks while it runs; what it did not is sent now.
        for block, tensor in output.blocks.items():
            if not self.store.holds(micro_batch, block):
                put(block, tensor)
        # Left are blocks that the chunk made in another order, or none of its own: a plan may send
        # after the pass what it could pass on before (as those of the benchmarks do).
        for message in fresh:
            self._send(message, self.store.leaf(*message.key))
        for message in step.after:
            self._send(message, output.partial)
        self._hand_over(chunk, micro_batch, output.partial)
        if output.loss is not None:
            self.losses.append(output.loss.detach())
        if self.training:
            self.outputs[chunk, micro_batch] = self._outputs(chunk, micro_batch, output)
        else:
            self._forget(chunk, micro_batch)

    def _accept(self, message: Message) -> None:
        """Wait for a block or partial and make it a leaf: the graph ends at the rank's border, and
        the gradient to be returned over it collects in ``.grad``."""
        tensor, (_, chunk, micro_batch) = self.inbox.take(message), message.action
        if message.block is None:
            self.partials[chunk, micro_batch] = tensor.requires_grad_(self.training)
        else:
            self.store.put(*message.key, tensor)

    def _hand_over(self, chunk: int, micro_batch: int, partial: Tensor | None) -> None:
        """Give the partial to the next chunk if that is on this rank too. Here, too, the graph is
        cut: each chunk has a backward pass of its own."""
        hop = self.plan.hop_out_of(chunk)
        if hop and hop.is_local and partial is not None:
            leaf = partial.detach().requires_grad_(self.training)
            self.partials[hop.dst_chunk, micro_batch] = leaf

    def _outputs(self, chunk: int, micro_batch: int, output: ChunkOutput) -> _Outputs:
        """What the backward pass needs; blocks that the chunk reads itself get their hook."""
        ends = {}
        for block, tensor in output.blocks.items():
            if block in self.plan.used_inside(chunk) and tensor.requires_grad:
                # As a root of the pass it would need what others give before the pass can start.
                # A hook is called when all readers inside the chunk have given theirs.
                tensor.register_hook(functools.partial(self._join, micro_batch, block))
            else:
                ends[block] = _edge(tensor)
        weight = None
        if output.loss is not None:
            weight = torch.full_like(output.loss, 1 / len(self.batches))
        return _Outputs(ends, _edge(output.partial), _edge(output.loss), weight)

    def _join(self, micro_batch: int, block: int, gradient: Tensor) -> Tensor:
        """Add the gradient of a block that was collected outside of its chunk."""
        if message := self.returning.pop((micro_batch, block), None):
            self._accept_gradient(message)
        collected = self.store.release(micro_batch, block)
        # Not in place: a hook must leave its argument as it is.
        return gradient if collected is None else gradient + collected

    def _forget(self, chunk: int, micro_batch: int) -> None:
        """Forward-only: let go of what no later chunk on this rank reads."""
        self.partials.pop((chunk, micro_batch), None)
        if chunk == self.plan.layout.chunks_of(self.stage.rank)[-1]:
            self.store.forget(micro_batch)

    def _backward(self, step: Step) -> None:
        _, chunk, micro_batch = step.action
        for message in step.before:
            self._accept_gradient(message)
        ends = self.outputs[chunk, micro_batch].blocks
        for message in step.inside:
            if message.block in ends:  # without a graph, hence without a hook to wait for it
                self._accept_gradient(message)
            else:  # the block's hook waits for it: what comes before that in the pass need not
                self.returning[message.key] = message
        is_last = step.action == self.program.last_backward[chunk]
        with self.last_backward(chunk) if is_last else nullcontext():
            self._differentiate(chunk, micro_batch)

        gradient = self._gradient_of_partial(step)
        for message in step.after:
            if not self.program.sends(message):
                self._accept_gradient(message)
            elif message.block is None:
                self._send(message, gradient)
            else:  # a block that came for this chunk, which was its last reader here
                self._send(message, self.store.release(*message.key))
        hop = self.plan.hop_into(chunk)
        if hop and hop.is_local and gradient is not None:
            self.partial_gradients[hop.src_chunk, micro_batch] = gradient

    def _gradient_of_partial(self, step: Step) -> Tensor | None:
        """That of the incoming partial, which the pass was the last to need; None without one."""
        _, chunk, micro_batch = step.action
        partial = self.partials.pop((chunk, micro_batch), None)
        if partial is None:
            return None
        if partial.grad is None:
            raise self._error(step, "the chunk gives its incoming partial no gradient")
        return partial.grad

    def _accept_gradient(self, message: Message) -> None:
        gradient, (_, chunk, micro_batch) = self.inbox.take(message), message.action
        if message.block is None:
            self.partial_gradients[chunk, micro_batch] = gradient
        else:
            self.store.deposit(*message.key, gradient)

    def _differentiate(self, chunk: int, micro_batch: int) -> None:
        """Backward through the chunk, from all that it made and that something depends on."""
        outputs = self.outputs.pop((chunk, micro_batch))
        # By now whoever reads these blocks has been differentiated: later chunks run backward
        # first, and what peers return was waited for.
        roots = [
            (edge, self.store.release(micro_batch, block)) for block, edge in outputs.blocks.items()
        ]
        roots.append((outputs.partial, self.partial_gradients.pop((chunk, micro_batch), None)))
        roots.append((outputs.loss, outputs.loss_weight))
        # No edge: there is nothing to learn before it. No gradient: nothing depends on it.
        used = [(edge, grad) for edge, grad in roots if edge is not None and grad is not None]
        torch.autograd.backward([edge for edge, _ in used], [grad for _, grad in used])

    def _send(self, message: Message, tensor: Tensor | None) -> None:
        assert tensor is not None  # both partials are checked, and what came has had a reader
        self.outbox.send(message, tensor, self.program.due(message))

    def _check_output(self, step: Step, output: ChunkOutput) -> None:
        produced = self.plan.produced(step.action.chunk)
        if sorted(output.blocks) != list(produced):
            raise self._error(
                step, f"the chunk made blocks {sorted(output.blocks)}, not {list(produced)}"
            )
        hop = self.plan.hop_out_of(step.action.chunk)
        if hop and hop.partial != (output.partial is not None):
            raise self._error(step, f"the plan has partial={hop.partial} after the chunk")

    def _assert_empty(self) -> None:
        """Raise PipelineError if the pass left anything behind."""
        self.store.assert_empty()
        self.inbox.assert_empty()
        for kept in (self.partials, self.partial_gradients, self.outputs):
            for chunk, micro_batch in kept:
                raise PipelineError(
                    f"pipeline rank {self.stage.rank}: a tensor of chunk {chunk}, micro-batch "
                    f"{micro_batch} is left at the end of the step"
                )

    def _error(self, step: Step, what: str) -> PipelineError:
        return PipelineError(f"pipeline rank {self.stage.rank}: {step.action}: {what}")


def _edge(tensor: Tensor | None) -> GradientEdge | None:
    return get_gradient_edge(tensor) if tensor is not None and tensor.requires_grad else None
