"""A look at one micro-batch on its way through the model: what every sublayer reads from which
source, how large outputs and stream are, and the gradients that come back.

A `Probe` travels in the `MicroBatch`; without one nothing here runs. It computes beside the model,
without a graph, and hands every tensor on with the values that it had.

Shapes: B samples, S tokens of each in the stream here, N sources, D size of what is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnres_train.model.norm import RMSNorm
from attnres_train.model.residual.stream import Residual, ResidualStream

Totals = dict[str, Tensor]
"""Sums over tokens under ``<what>/<sublayer>``, fp64 on the device: those of ranks that have other
tokens, or other layers, add up. See `Probe`."""


class Probe:
    """What one micro-batch has shown, as `Totals`:

    - ``depth_weight/l`` [2 N + 1]: of the weights by which sublayer l (``num_sublayers + 1``: the
      output head) reads its sources, the sums, the sums of squares and the number of tokens.
      Finished blocks come first, the open one last. Nothing where there are no such weights.
    - ``output/l``, ``stream/l``, ``output_gradient/l`` [2]: sum of squares and number of elements
      of what sublayer l writes, of the open (or just closed) block after it (0: the embedding), and
      of the gradient of what it writes, which comes with the backward pass.

    A forward pass that is recomputed shows nothing new.
    """

    def __init__(self) -> None:
        self.totals: Totals = {}

    def weights(self, sublayer: int, weights: Tensor | None) -> None:
        """Take in the depth-attention weights [B, S, N] of ``sublayer``."""
        if weights is not None:
            wide = weights.double().flatten(0, -2)
            count = wide.new_tensor([len(wide)])
            sums = [wide.sum(0), wide.square().sum(0), count]
            self.totals[f"depth_weight/{sublayer}"] = torch.cat(sums)

    def magnitude(self, what: str, sublayer: int, tensor: Tensor) -> None:
        """Take in ``tensor`` [B, S, D]."""
        with torch.no_grad():
            wide = torch.promote_types(tensor.dtype, torch.float32)
            norm = torch.linalg.vector_norm(tensor, dtype=wide).double()
            count = norm.new_tensor(float(tensor.numel()))
            self.totals[f"{what}/{sublayer}"] = torch.stack([norm.square(), count])

    def seen(self, what: str, sublayer: int) -> bool:
        """Whether the pass has come there before."""
        return f"{what}/{sublayer}" in self.totals


class ProbedStream:
    """``stream`` of ``residual``, seen by ``probe``; to a layer it is the stream itself."""

    def __init__(self, stream: ResidualStream, residual: Residual, probe: Probe) -> None:
        self._stream, self._residual, self._probe = stream, residual, probe

    @property
    def blocks(self) -> list[Tensor]:
        return self._stream.blocks

    @property
    def partial(self) -> Tensor | None:
        return self._stream.partial

    def read_normed(self, sublayer: int, norm: RMSNorm) -> Tensor:
        """`ResidualStream.read_normed`."""
        if not self._probe.seen("output", sublayer):
            stream, readers = self._stream, self._stream.readers
            show_read(self._probe, self._residual, sublayer, readers, stream.blocks, stream.source)
        return self._stream.read_normed(sublayer, norm)

    def write(self, sublayer: int, output: Tensor) -> None:
        """`ResidualStream.write`."""
        if self._probe.seen("output", sublayer):
            self._stream.write(sublayer, output)
            return
        self._probe.magnitude("output", sublayer, output)
        if output.requires_grad:
            output.register_hook(
                lambda gradient: self._probe.magnitude("output_gradient", sublayer, gradient)
            )
            # A node of its own: where the output alone is a block, what other ranks return of its
            # gradient is added on the way here, by a hook of the block.
            output = output.view_as(output)
        self._stream.write(sublayer, output)
        source = self._stream.source
        held = self._stream.blocks[-1] if source is None else source
        self._probe.magnitude("stream", sublayer, held)


@torch.no_grad()
def show_read(
    probe: Probe,
    residual: Residual,
    sublayer: int,
    readers: Mapping[int, object],
    blocks: Sequence[Tensor],
    source: Tensor | None,
) -> None:
    """Show ``probe`` the weights of the read before ``sublayer``; ``source`` is the open block."""
    sources = [*blocks] if source is None else [*blocks, source]
    # Autocast would make the products of a formula in fp32 those of bf16.
    with torch.autocast(sources[0].device.type, enabled=False):
        probe.weights(sublayer, residual.weights(sublayer, readers.get(sublayer), sources))
