"""Block arithmetic of Attention Residuals: which sublayer reads and writes which block.

Pure Python, so that planning a pipeline needs neither torch nor the model.

A *sublayer* (1-based, ``1..L``) is one attention or one MLP. Block 0 is the token embedding, block
``n >= 1`` the sum of up to ``S`` consecutive sublayer outputs (arXiv 2603.15031, section 3). The
*partial* is the running sum of the block that is still open.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model with ``num_sublayers`` sublayers.

    ``block_size`` counts sublayers; 1 is Full Attention Residuals. ``None`` is the standard
    residual stream: there are no blocks, and the partial carries embedding plus every output.
    ``partial_units`` is the size of a partial as a multiple of a block's.
    """

    num_sublayers: int
    block_size: int | None
    partial_units: int = 1

    def __post_init__(self) -> None:
        if self.num_sublayers < 1:
            raise ValueError(f"num_sublayers must be at least 1, not {self.num_sublayers}")
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"residual.block_size must be at least 1, not {self.block_size}")

    @property
    def has_blocks(self) -> bool:
        return self.block_size is not None

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Last sublayer of each block; block 0, the embedding, ends at 0. Empty without blocks."""
        if self.block_size is None:
            return ()
        # range() never reaches the last sublayer, which ends a block, shorter perhaps, in any case.
        full = range(0, self.num_sublayers, self.block_size)
        return (*full, self.num_sublayers)

    @property
    def num_blocks(self) -> int:
        """Blocks including the embedding: the sources of the output aggregation."""
        return len(self.ends)

    def block_of(self, sublayer: int) -> int:
        """The block that ``sublayer`` adds to (0 for the embedding, sublayer 0)."""
        assert self.block_size is not None
        return -(-sublayer // self.block_size)

    def opens(self, sublayer: int) -> bool:
        """Whether ``sublayer`` starts a block, so that no partial exists when it reads."""
        return self.block_size is not None and (sublayer - 1) % self.block_size == 0

    def closes(self, sublayer: int) -> bool:
        """Whether the partial becomes a finished block once ``sublayer`` has been added."""
        return sublayer > 0 and sublayer in self.ends

    def completed_before(self, sublayer: int) -> int:
        """How many blocks (0 included) are finished when ``sublayer`` reads: its sources are blocks
        ``0..n-1``, and the partial unless it opens a block (Eq. 6)."""
        return 0 if self.block_size is None else self.block_of(sublayer)

    def num_sources(self, sublayer: int) -> int:
        """Tensors that ``sublayer`` reads from (num_sublayers + 1: the output aggregation)."""
        if sublayer > self.num_sublayers:
            return self.num_blocks
        return self.completed_before(sublayer) + (self.has_blocks and not self.opens(sublayer))

    def partial_after(self, sublayer: int) -> bool:
        """Whether a partial exists after ``sublayer`` (0: after the embedding)."""
        return self.block_size is None or not (sublayer == 0 or self.closes(sublayer))
