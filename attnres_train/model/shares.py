"""Which tokens of every sample are here, and where documents lie among them.

Shapes: B samples of a micro-batch, T tokens of a sample; S shares that are here, t tokens of each;
R = B S rows.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Span(NamedTuple):
    """The part of a document that is in one share: ``tokens`` that are here, the last ones of those
    from ``start`` to before ``end``. Positions are in sample ``sample``, ``start`` is the
    document's first token."""

    sample: int
    tokens: int
    start: int
    end: int


@dataclass(frozen=True)
class Shares:
    """A sample is ``count`` consecutive shares of equal size, of which those numbered ``own``,
    ascending, are here, end to end: [B, S t, ...]. By default that is all of it."""

    count: int = 1
    own: tuple[int, ...] = (0,)

    def of(self, x: Tensor) -> Tensor:
        """What is here of whole samples: [B, T, ...] -> [B, S t, ...]."""
        if self.count == 1:
            return x
        return x.unflatten(1, (self.count, -1))[:, list(self.own)].flatten(1, 2)

    def rows(self, x: Tensor) -> Tensor:
        """A row for every share: [B, S t, ...] -> [R, t, ...]."""
        return x.unflatten(1, (len(self.own), -1)).flatten(0, 1)

    def joined(self, rows: Tensor) -> Tensor:
        """`rows` undone."""
        return rows.unflatten(0, (-1, len(self.own))).flatten(1, 2)

    def starts(self, cu_seqlens: Tensor, rows: torch.Size, before: int = 0) -> Tensor:
        """Whether a document starts there, bool [R, before + t], for ``rows`` [R, t, ...] and the
        ``before`` tokens in front of each. ``cu_seqlens`` as in `MicroBatch`, of whole samples."""
        samples, length = rows[0] // len(self.own), rows[1]
        whole = self.count * length
        # Documents at the very end may be empty: they start after the last token.
        starts = torch.zeros(samples * whole + 1, dtype=torch.bool, device=cu_seqlens.device)
        starts = starts.index_fill(0, cu_seqlens.long(), True)[:-1].view(samples, whole)
        starts[:, 0] = True
        windows = F.pad(starts, (before, 0)).unfold(1, before + length, length)
        return windows[:, list(self.own)].flatten(0, 1)

    def causal(
        self, x: Tensor, cu_seqlens: Tensor | None
    ) -> Iterator[tuple[Tensor, tuple[slice, slice]]]:
        """What of ``x`` [B, S t, ...] lies together in a document, one after the other, or without
        ``cu_seqlens`` in a share; and the index in whole samples [B, T, ...] of all that it and
        what is in front of it are: it is the last of that."""
        if cu_seqlens is None:
            size = x.shape[1] // len(self.own)
            for part, share in zip(x.split(size, dim=1), self.own, strict=True):
                yield part, (slice(None), slice(0, (share + 1) * size))
            return
        spans = list(self.spans(cu_seqlens, *x.shape[:2]))
        parts = x.flatten(0, 1).unsqueeze(0).split([span.tokens for span in spans], dim=1)
        for part, span in zip(parts, spans, strict=True):
            yield part, (slice(span.sample, span.sample + 1), slice(span.start, span.end))

    def spans(self, cu_seqlens: Tensor, batch: int, length: int) -> Iterator[Span]:
        """The documents of [B, S t] = [``batch``, ``length``], in the order in which their tokens
        lie there."""
        size = length // len(self.own)
        whole = size * self.count
        borders = sorted({*cu_seqlens.tolist(), *range(0, batch * whole + 1, whole)})
        for sample in range(batch):
            offset = sample * whole
            for share in self.own:
                begin, end = offset + share * size, offset + (share + 1) * size
                document = bisect_right(borders, begin) - 1
                while (start := borders[document]) < end:
                    last = min(end, borders[document + 1])
                    tokens = last - max(begin, start)
                    yield Span(sample, tokens, start - offset, last - offset)
                    document += 1


def cumulative(starts: Tensor) -> Tensor:
    """Cumulative lengths int32 [0, ..., R n] of the documents in rows [R, n], which start where
    ``starts`` bool [R, n] says; at the start of a row one does in any case."""
    starts = starts.clone()
    starts[:, 0] = True
    return F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=starts.numel()).int()
