"""Copies in host memory of what is to be written, so that training may go on meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from attnres_train.checkpoint.tensor_file import bytes_of, view_of

# The allocator of page-locked memory rounds up to a power of two: of one large buffer, up to half
# would be lost.
SEGMENT_BYTES = 2**28


class HostBuffers:
    """``nbytes`` of host memory, page-locked for copies from a GPU, that every save uses again."""

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        sizes = [SEGMENT_BYTES] * (nbytes // SEGMENT_BYTES)
        sizes += [nbytes % SEGMENT_BYTES] if nbytes % SEGMENT_BYTES else []
        self._segments = [torch.empty(n, dtype=torch.uint8, pin_memory=pinned) for n in sizes]
        self.nbytes = nbytes

    @torch.no_grad()
    def fill(self, tensors: Iterable[Tensor]) -> None:
        """Copy the bytes of ``tensors``, one after the other; returns once all are here."""
        start, devices = 0, set()
        for tensor in tensors:
            flat = bytes_of(tensor)
            done = 0
            for piece in self._pieces(start, start + len(flat)):
                piece.copy_(flat[done : done + len(piece)], non_blocking=True)
                done += len(piece)
            start += len(flat)
            devices.add(tensor.device)
        assert start == self.nbytes, f"{start} bytes for buffers of {self.nbytes}"
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()

    def read(self, start: int, stop: int) -> Iterator[memoryview]:
        """Bytes ``start`` to ``stop``, in pieces."""
        return map(view_of, self._pieces(start, stop))

    def _pieces(self, start: int, stop: int) -> Iterator[Tensor]:
        while start < stop:
            number, begin = divmod(start, SEGMENT_BYTES)
            end = min(SEGMENT_BYTES, begin + stop - start)
            yield self._segments[number][begin:end]
            start += end - begin
