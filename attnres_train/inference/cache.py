"""What is kept of the tokens so far, layer by layer: a state of fixed size for KDA, a latent per
token for MLA. Nothing for depth attention, which reads no other token.

Shapes: B rows, t tokens of a pass, T of a row so far; P channels, H heads, K key size, V value
size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attnres_train.model.ports import Recurrence
from attnres_train.model.shares import Shares


class LayerPast:
    """`model.ports.Past` of a layer: after a pass it holds its tokens too.

    KDA's convolutions leave the last inputs of each row, ``tail`` [B, taps - 1, 3P], its state is
    ``state`` [B, H, K, V], fp32 (fp64). Of MLA ``latents`` [B, room, R + E] are the normed latent
    and the shared key of the first ``length`` tokens; rows end together there, and row b begins at
    ``begins[b]``.
    """

    shares = Shares()
    bytes_sent = 0

    def __init__(self, room: int = 0) -> None:
        """``room``: for how many tokens memory is set aside at once; more is found as needed."""
        self.room = room
        self.tail: Tensor | None = None
        self.state: Tensor | None = None
        self.latents: Tensor | None = None
        self.begins: Tensor | None = None
        self.length = 0

    def led(self, rows: Sequence[Tensor], tokens: int) -> list[Tensor]:
        together = torch.cat(list(rows), dim=-1)
        if self.tail is None:
            self.tail = together.new_zeros(len(together), tokens, together.shape[-1])
        led = torch.cat((self.tail, together), dim=1)
        self.tail = led[:, led.shape[1] - tokens :].clone()
        return list(led.split([x.shape[-1] for x in rows], dim=-1))

    def recur(self, recurrence: Recurrence, values: Tensor, key_size: int) -> Tensor:
        if self.state is None:
            rows, _, heads, size = values.shape
            wide = torch.promote_types(values.dtype, torch.float32)
            self.state = values.new_zeros(rows, heads, key_size, size, dtype=wide)
        o, self.state = recurrence(values, self.state)
        return o

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        new = torch.cat(list(parts), dim=-1)
        end = self.length + new.shape[1]
        if self.latents is None or end > self.latents.shape[1]:
            room = max(self.room, end if self.latents is None else end + end // 2)
            more = new.new_empty(len(new), room, new.shape[-1])
            if self.latents is not None:
                more[:, : self.length] = self.latents[:, : self.length]
            self.latents = more
        self.latents[:, self.length : end] = new
        self.length = end
        return list(self.latents[:, :end].split([x.shape[-1] for x in parts], dim=-1))


class Cache:
    """The pasts of ``layers``, by layer."""

    def __init__(self, layers: Iterable[int], room: int = 0) -> None:
        self.pasts = {layer: LayerPast(room) for layer in layers}

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        held = [
            tensor
            for past in self.pasts.values()
            for tensor in (past.tail, past.state, past.latents)
            if tensor is not None
        ]
        return sum(tensor.nbytes for tensor in held)

    @classmethod
    def stacked(cls, caches: Sequence[Cache], room: int = 0) -> Cache:
        """The rows of ``caches``, however many tokens each has had, in one, with memory for
        ``room`` more tokens."""
        whole = cls(caches[0].pasts)
        for layer, past in whole.pasts.items():
            _stack(past, [cache.pasts[layer] for cache in caches], room)
        return whole

    def keep(self, rows: Tensor) -> None:
        """Keep ``rows``, int64, of it alone."""
        for past in self.pasts.values():
            for name in ("tail", "state", "latents", "begins"):
                tensor = getattr(past, name)
                if tensor is not None:
                    setattr(past, name, tensor.index_select(0, rows.to(tensor.device)))


def _stack(past: LayerPast, parts: Sequence[LayerPast], room: int) -> None:
    for name in ("tail", "state"):
        found = [getattr(part, name) for part in parts]
        if all(tensor is not None for tensor in found):
            setattr(past, name, torch.cat(found))
    if parts[0].latents is None:
        return
    past.length = max(part.length for part in parts)
    rows, begins = [], []
    for part in parts:
        assert part.latents is not None
        lead = past.length - part.length
        # Rows end together, so that a new token has the same place in all.
        rows.append(F.pad(part.latents[:, : part.length], (0, 0, lead, room)))
        own = part.begins
        begins.append(
            part.latents.new_zeros(len(part.latents), dtype=torch.int64) if own is None else own
        )
        begins[-1] = begins[-1] + lead
    past.latents, past.begins = torch.cat(rows), torch.cat(begins)
