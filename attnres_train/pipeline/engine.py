"""Engine: runs a rank's list of forward and backward passes.

Blocks cross to the next rank before the chunk that passes them on is computed, those that it makes
as soon as they are complete (see `pipeline.messages`). A backward pass starts from what the chunk
leaves behind: its partial with the gradient that came back, the loss with 1/M, the blocks that it
does not read itself with the gradient collected in the store. Those that it does read get what was
collected when the pass comes to where they were made, so that it need not wait for it before. One
process is the plan with one chunk: nothing here asks for more than one.

Shapes: B samples of a micro-batch, T tokens, D hidden_size; M micro-batches, P ranks.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from attnres_train.pipeline.mail import Inbox, Outbox
from attnres_train.pipeline.messages import Message, PipelineError
from attnres_train.pipeline.plan import TransportPlan
from attnres_train.pipeline.program import Program, Step
from attnres_train.pipeline.schedule import Schedule, forward_only, one_f_one_b
from attnres_train.pipeline.store import BlockStore
from attnres_train.pipeline.transport import Transport
from attnres_train.pipeline.waits import PeerError


class ChunkOutput(Protocol):
    """What a chunk makes of one micro-batch; tensors are [B, T, D]."""

    blocks: dict[int, Tensor]
    """The blocks that it completes."""
    partial: Tensor | None
    """The open block behind it."""
    loss: Tensor | None
    """Last chunk: scalar, the micro-batch's mean loss."""


OnBlock = Callable[[int, Tensor], None]
"""Told of each block as it is complete, in ascending order."""
Chunk = Callable[[Any, dict[int, Tensor], Tensor | None, OnBlock], ChunkOutput]
"""(micro-batch with ``tokens`` [B, T], blocks complete before the chunk, partial, whom to tell of
new blocks) -> output. To tell is optional: it lets blocks leave before the pass is over."""


@dataclass(frozen=True)
class StepResult:
    loss: Tensor | None
    """Mean over micro-batches, scalar without graph; None but on the last chunk's rank."""
    p2p_bytes: int
    """Bytes that this rank sent."""
    peak_blocks: int
    """Most blocks in this rank's store at any time."""
    peak_bytes: int
    """Most memory that they kept alive."""


class Engine:
    """The chunks of pipeline rank ``rank``, driven by ``plan`` and a schedule.

    ``chunks`` maps chunk index to module. Blocks, partials and their gradients have
    ``stream_dtype`` and live on ``device``. ``debug`` sends each tensor's identity beside it and
    checks it on arrival. ``schedule(P, V, M)`` orders the passes. Micro-batches may differ in shape
    and number from call to call; for every new M the schedule is validated (ScheduleError).
    """

    def __init__(
        self,
        chunks: Mapping[int, Chunk],
        plan: TransportPlan,
        rank: int,
        transport: Transport,
        hidden_size: int,
        stream_dtype: torch.dtype,
        device: torch.device | str = "cpu",
        debug: bool = False,
        schedule: Callable[[int, int, int], Schedule] = one_f_one_b,
    ) -> None:
        self.chunks, self.plan, self.rank, self.transport = chunks, plan, rank, transport
        self.hidden_size, self.stream_dtype = hidden_size, stream_dtype
        self.device, self.debug = device, debug
        self.schedule = schedule
        self._programs: dict[tuple[Callable, int], Program] = {}

    def train_step(self, batches: Sequence[Any]) -> StepResult:
        """Forward and backward of every micro-batch. Gradients of the mean of their losses are
        added to the parameters' ``.grad``."""
        return self._run(self.program(self.schedule, len(batches)), batches)

    def evaluate(self, batches: Sequence[Any]) -> StepResult:
        """The losses alone."""
        return self._run(self.program(forward_only, len(batches)), batches)

    def program(
        self, schedule: Callable[[int, int, int], Schedule], num_micro_batches: int
    ) -> Program:
        """The validated program of this rank, made once."""
        if num_micro_batches < 1:
            raise ValueError("a step needs at least one micro-batch")
        key = schedule, num_micro_batches
        if key not in self._programs:
            layout = self.plan.layout
            actions = schedule(layout.num_ranks, layout.num_virtual_stages, num_micro_batches)
            self._programs[key] = Program(self.plan, actions, self.rank)
        return self._programs[key]

    def _run(self, program: Program, batches: Sequence[Any]) -> StepResult:
        sent_before = self.transport.bytes_sent
        run = _Pass(self, program, batches)
        with torch.set_grad_enabled(program.training):
            run.run()
        return StepResult(
            loss=torch.stack(run.losses).mean() if run.losses else None,
            p2p_bytes=self.transport.bytes_sent - sent_before,
            peak_blocks=run.store.peak_blocks,
            peak_bytes=run.store.peak_bytes,
        )


@dataclass
class _Outputs:
    """Where the backward pass of a chunk starts. Edges hold the graph, not the tensors."""

    blocks: dict[int, GradientEdge | None]
    """Those that the chunk does not read itself."""
    partial: GradientEdge | None
    loss: GradientEdge | None
    loss_weight: Tensor | None


class _Pass:
    """The state of one run through a program; gone at its end."""

    def __init__(self, engine: Engine, program: Program, batches: Sequence[Any]) -> None:
        self.engine, self.program, self.batches = engine, program, batches
        self.plan, self.training = engine.plan, program.training
        self.store = BlockStore(engine.plan, engine.rank, self.training)
        make_buffer = functools.partial(_buffer, engine, batches)
        self.inbox = Inbox(engine.rank, engine.transport, make_buffer, engine.debug)
        self.outbox = Outbox(engine.rank, engine.transport, engine.stream_dtype, engine.debug)
        self.partials: dict[tuple[int, int], Tensor] = {}
        """(chunk, micro-batch) -> the chunk's incoming partial, a leaf."""
        self.partial_gradients: dict[tuple[int, int], Tensor] = {}
        """(chunk, micro-batch) -> gradient of the chunk's outgoing partial."""
        self.outputs: dict[tuple[int, int], _Outputs] = {}
        self.returning: dict[tuple[int, int], Message] = {}
        """(micro-batch, block) -> its gradient's message, which the backward pass under way has not
        come to yet."""
        self.losses: list[Tensor] = []

    def run(self) -> None:
        try:
            for step in self.program.steps:
                for message in step.posted:
                    self.inbox.post(message)
                (self._forward if step.action.kind == "F" else self._backward)(step)
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
                self._send(message, self.store.leaf(micro_batch, message.block))
            else:
                self._accept(message)
        sources = {block: self.store.leaf(micro_batch, block) for block in self.plan.reads(chunk)}
        partial = self.partials.get((chunk, micro_batch))
        fresh = deque(step.inside)

        def put(block: int, tensor: Tensor) -> None:
            self.store.put(micro_batch, block, tensor)
            if fresh and fresh[0].block == block:
                self._send(fresh.popleft(), tensor)

        output = self.engine.chunks[chunk](self.batches[micro_batch], sources, partial, put)
        self._check_output(step, output)
        for block, tensor in output.blocks.items():
            if not self.store.holds(micro_batch, block):
                put(block, tensor)
        for message in fresh:
            self._send(message, self.store.leaf(micro_batch, message.block))
        for message in step.behind:
            self._send(message, output.partial)
        self._hand_over(chunk, micro_batch, output.partial)
        if output.loss is not None:
            self.losses.append(output.loss.detach())
        if self.training:
            self.outputs[chunk, micro_batch] = self._outputs(chunk, micro_batch, output)
        else:
            self._forget(chunk, micro_batch)

    def _accept(self, message: Message) -> None:
        """Wait for a block or partial and make it a leaf."""
        tensor, (_, chunk, micro_batch) = self.inbox.take(message), message.action
        if message.block is None:
            self.partials[chunk, micro_batch] = tensor.requires_grad_(self.training)
        else:
            self.store.put(micro_batch, message.block, tensor)

    def _hand_over(self, chunk: int, micro_batch: int, partial: Tensor | None) -> None:
        """Give the partial to the next chunk if that is on this rank too."""
        hop = self.plan.hop_out_of(chunk)
        if hop and hop.is_local and hop.partial:
            leaf = partial.detach().requires_grad_(self.training)
            self.partials[hop.dst_chunk, micro_batch] = leaf

    def _outputs(self, chunk: int, micro_batch: int, output: ChunkOutput) -> _Outputs:
        """What the backward pass needs; blocks that the chunk reads itself get their hook."""
        ends = {}
        for block, tensor in output.blocks.items():
            if block in self.plan.used_inside(chunk) and tensor.requires_grad:
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
        return gradient if collected is None else gradient + collected

    def _forget(self, chunk: int, micro_batch: int) -> None:
        """Forward-only: let go of what no later chunk on this rank reads."""
        self.partials.pop((chunk, micro_batch), None)
        if chunk == self.plan.layout.chunks_of(self.engine.rank)[-1]:
            self.store.forget(micro_batch)

    def _backward(self, step: Step) -> None:
        _, chunk, micro_batch = step.action
        for message in step.before:
            self._accept_gradient(message)
        ends = self.outputs[chunk, micro_batch].blocks
        for message in step.inside:
            if message.block in ends:  # without a graph, hence without a hook to wait for it
                self._accept_gradient(message)
            else:
                self.returning[micro_batch, message.block] = message
        self._differentiate(chunk, micro_batch)

        partial = self.partials.pop((chunk, micro_batch), None)
        if partial is not None and partial.grad is None:
            raise self._error(step, "the chunk gives its incoming partial no gradient")
        for message in step.behind:
            if not self.program.sends(message):
                self._accept_gradient(message)
            elif message.block is None:
                self._send(message, partial.grad)
            else:
                self._send(message, self.store.release(micro_batch, message.block))

        hop = self.plan.hop_into(chunk)
        if hop and hop.is_local and hop.partial:
            self.partial_gradients[hop.src_chunk, micro_batch] = partial.grad

    def _accept_gradient(self, message: Message) -> None:
        gradient, (_, chunk, micro_batch) = self.inbox.take(message), message.action
        if message.block is None:
            self.partial_gradients[chunk, micro_batch] = gradient
        else:
            self.store.deposit(micro_batch, message.block, gradient)

    def _differentiate(self, chunk: int, micro_batch: int) -> None:
        """Backward through the chunk, from all that it made and that something depends on."""
        outputs = self.outputs.pop((chunk, micro_batch))
        roots = [
            (edge, self.store.release(micro_batch, block)) for block, edge in outputs.blocks.items()
        ]
        roots.append((outputs.partial, self.partial_gradients.pop((chunk, micro_batch), None)))
        roots.append((outputs.loss, outputs.loss_weight))
        used = [(edge, grad) for edge, grad in roots if edge is not None and grad is not None]
        torch.autograd.backward([edge for edge, _ in used], [grad for _, grad in used])

    def _send(self, message: Message, tensor: Tensor) -> None:
        self.outbox.send(message, tensor, self.program.due(message))

    def _check_output(self, step: Step, output: ChunkOutput) -> None:
        produced = self.plan.produced(step.action.chunk)
        if sorted(output.blocks) != list(produced):
            raise self._error(
                step, f"the chunk made blocks {sorted(output.blocks)}, not {list(produced)}"
            )
        hop = self.plan.hop_out_of(step.action.chunk)
        if hop and hop.partial != (output.partial is not None):
            raise self._error(step, f"the plan has partial={hop.partial} behind the chunk")

    def _assert_empty(self) -> None:
        """Raise PipelineError if the pass left anything behind."""
        self.store.assert_empty()
        self.inbox.assert_empty()
        for kept in (self.partials, self.partial_gradients, self.outputs):
            for chunk, micro_batch in kept:
                raise PipelineError(
                    f"rank {self.engine.rank}: a tensor of chunk {chunk}, micro-batch "
                    f"{micro_batch} is left at the end of the step"
                )

    def _error(self, step: Step, what: str) -> PipelineError:
        return PipelineError(f"rank {self.engine.rank}: {step.action}: {what}")


def _buffer(engine: Engine, batches: Sequence[Any], micro_batch: int) -> Tensor:
    shape = *batches[micro_batch].tokens.shape, engine.hidden_size
    return torch.empty(shape, dtype=engine.stream_dtype, device=engine.device)


def _edge(tensor: Tensor | None) -> GradientEdge | None:
    return get_gradient_edge(tensor) if tensor is not None and tensor.requires_grad else None
