"""A small independent model: linear sublayers over depth attention by its plain formula.

Shapes: B samples, T tokens, D hidden_size; L sublayers, 1-based.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from attnres_train.pipeline.plan.layout import Layout

HIDDEN_SIZE, VOCAB_SIZE = 8, 11


@dataclass
class ToyBatch:
    tokens: Tensor


@dataclass
class ToyOutput:
    blocks: dict[int, Tensor] = field(default_factory=dict)
    partial: Tensor | None = None
    loss: Tensor | None = None


def depth_attention(query: Tensor, sources: list[Tensor]) -> Tensor:
    """softmax over sources of query . source / rms(source), by arXiv 2603.15031 Eqs. 2 to 4."""
    values = torch.stack(sources)
    keys = values / values.pow(2).mean(-1, keepdim=True).add(1e-5).sqrt()
    return ((keys @ query).softmax(0).unsqueeze(-1) * values).sum(0)


class ToyChunk(nn.Module):
    """The sublayers of one chunk; weights depend on the sublayer alone, not on the layout."""

    def __init__(self, layout: Layout, chunk: int) -> None:
        super().__init__()
        self.schema = layout.blocks
        self.sublayers = layout.sublayers(chunk)
        self.is_first, self.is_last = chunk == 0, chunk == layout.num_chunks - 1
        names = [f"{kind}{i}" for i in self.sublayers for kind in ("weight", "query")]
        names += ["embedding"] * self.is_first + ["output_query", "head"] * self.is_last
        for name in names:
            self.register_parameter(name, nn.Parameter(initial(name)))

    def forward(
        self,
        batch: ToyBatch,
        blocks: dict[int, Tensor],
        partial: Tensor | None,
        on_block: Callable[[int, Tensor], None] = lambda block, tensor: None,
    ) -> ToyOutput:
        blocks, given = dict(blocks), set(blocks)
        if self.is_first:
            embedding = self.embedding[batch.tokens]
            partial = None if self.schema.has_blocks else embedding
            if self.schema.has_blocks:
                blocks[0] = embedding
                on_block(0, embedding)
        for sublayer in self.sublayers:
            sources = [*blocks.values(), *([] if partial is None else [partial])]
            read = depth_attention(getattr(self, f"query{sublayer}"), sources)
            output = torch.tanh(read @ getattr(self, f"weight{sublayer}"))
            partial = output if partial is None else partial + output
            if self.schema.closes(sublayer):
                blocks[self.schema.block_of(sublayer)] = partial
                on_block(self.schema.block_of(sublayer), partial)
                partial = None
        made = {block: tensor for block, tensor in blocks.items() if block not in given}
        if not self.is_last:
            return ToyOutput(made, partial)
        sources = [*blocks.values(), *([] if partial is None else [partial])]
        logits = depth_attention(self.output_query, sources) @ self.head
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.tokens.flatten())
        return ToyOutput(made, partial, loss)


def initial(name: str) -> Tensor:
    shapes = {
        "embedding": (VOCAB_SIZE, HIDDEN_SIZE),
        "head": (HIDDEN_SIZE, VOCAB_SIZE),
        "weight": (HIDDEN_SIZE, HIDDEN_SIZE),
    }
    shape = shapes.get(name.rstrip("0123456789"), (HIDDEN_SIZE,))
    seed = int.from_bytes(name.encode(), "little") % 2**31
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5


def toy_batches(lengths: Iterable[int], seed: int = 0) -> list[ToyBatch]:
    """One micro-batch of two samples for each sequence length."""
    generator = torch.Generator().manual_seed(seed)
    return [
        ToyBatch(torch.randint(VOCAB_SIZE, (2, length), generator=generator)) for length in lengths
    ]


def gradients(chunks: Iterable[nn.Module]) -> dict[str, Tensor]:
    """Every parameter's gradient by name, over all ``chunks``."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
    }
