"""Prompts whose tokens ranks share: each passes a piece of every pass, and with it the blocks of
Attention Residuals of those tokens alone (arXiv 2603.15031, section 4.2).

What a token needs of those in front of it is what training asks for (`parallel.context`), only that
a pass goes on from earlier ones, and that afterwards every rank has what decoding goes on from.

Shapes: C ranks, t tokens here of C t of a pass, T of the prompt so far; P channels, H heads, K key
size, V value size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from attnres_train.inference.cache import Cache, LayerPast
from attnres_train.inference.prefill import PREFILL_TOKENS, Piece
from attnres_train.model.ports import Recurrence
from attnres_train.model.shares import Shares
from attnres_train.model.walk import Pasts
from attnres_train.parallel.context import from_any_state
from attnres_train.parallel.shares import scan
from attnres_train.parallel.tensor import gathered


class SharedPrefill:
    """The `prefill.Prefill` of ranks that share tokens: those of ``context`` share a pass, in the
    order of its ranks, and of the ``tensor`` ranks with the same share each has a part of it in its
    stream. ``most`` tokens are those of a rank at a time.

    The last tokens, one for every rank at most, each passes itself, as those that come after them:
    so all have the logits. Collective.
    """

    def __init__(self, context: ProcessGroup, tensor: int, most: int = PREFILL_TOKENS) -> None:
        self.context, self.most = context, most
        self.even = context.size() * tensor

    def pieces(self, tokens: Tensor, cache: Cache) -> Iterator[Piece]:
        ranks, even = self.context.size(), self.even
        shared = (tokens.shape[1] - 1) // even * even
        at_once = max(1, self.most * ranks // even) * even
        pasts: Pasts = cache.pasts
        if ranks > 1:
            pasts = {layer: SharedPast(past, self.context) for layer, past in cache.pasts.items()}
        for start in range(0, shared, at_once):
            of_pass = tokens[:, start : min(start + at_once, shared)]
            own = of_pass.chunk(ranks, dim=1)[self.context.rank()]
            yield Piece.of(own, pasts, asks=False)
        yield Piece.of(tokens[:, shared:], cache.pasts, asks=True)


class SharedPast:
    """`model.ports.Past` of a layer in passes of which rank r of C of ``group`` has the r-th of C
    equal shares; no text is behind another. Fills ``past``, on every rank with what all have
    passed. Collective."""

    shares = Shares()
    bytes_sent = 0
    begins = None

    def __init__(self, past: LayerPast, group: ProcessGroup) -> None:
        self.past, self.group = past, group

    def led(self, rows: Sequence[Tensor], tokens: int) -> list[Tensor]:
        if not tokens:
            return list(rows)
        # What the shares end with; all of them, where they are shorter than what is asked for.
        ends = torch.cat([x[:, -tokens:] for x in rows], dim=-1)
        size = ends.shape[1]
        behind = gathered(ends, self.group, axis=1)
        # To the past they are the tokens of a pass: the first of these are in front of all.
        (line,) = self.past.led([behind], tokens)
        start = self.group.rank() * size
        fronts = line[:, start : start + tokens].split([x.shape[-1] for x in rows], dim=-1)
        return [torch.cat(pair, dim=1) for pair in zip(fronts, rows, strict=True)]

    def recur(self, recurrence: Recurrence, values: Tensor, key_size: int) -> Tensor:
        after, outputs = from_any_state(recurrence, values, key_size)
        size = after.shape[-1] - key_size
        ends, maps = gathered(after.unsqueeze(1), self.group, axis=1).split([size, key_size], -1)
        first = self.past.state
        with torch.autocast(values.device.type, enabled=False):
            states = scan(maps, ends, first)
            self.past.state = maps[:, -1] @ states[-1] + ends[:, -1]
        return outputs(states[self.group.rank()])

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        before, own = self.past.length, parts[0].shape[1]
        of_all = gathered(torch.cat(list(parts), dim=-1), self.group, axis=1)
        (latents,) = self.past.gather([of_all])
        end = before + (self.group.rank() + 1) * own
        return list(latents[:, :end].split([x.shape[-1] for x in parts], dim=-1))
