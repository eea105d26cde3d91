"""Tensors that travel together, in one message."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Flat:
    """``tensors`` of one dtype one after another: a copy, or the tensor itself where there is one,
    contiguous. ``values`` is what to send or receive into."""

    @torch.no_grad()
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [tensor.detach() for tensor in tensors]
        self._is_copy = len(tensors) > 1 or not tensors[0].is_contiguous()
        flat = [tensor.reshape(-1) for tensor in self._tensors]
        self.values = torch.cat(flat) if self._is_copy else self._tensors[0]

    @torch.no_grad()
    def unpack(self) -> None:
        """Give the tensors the values."""
        if not self._is_copy:
            return
        parts = self.values.split([tensor.numel() for tensor in self._tensors])
        for tensor, part in zip(self._tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
