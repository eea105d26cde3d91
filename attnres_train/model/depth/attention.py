"""Attention over depth: the read of Attention Residuals (arXiv 2603.15031, Eqs. 2-6).

Shapes: D hidden_size, N sources, S queries; ``...`` are the token dimensions (batch, time), equal
for all sources. A sublayer reads, per token, a softmax-weighted sum of earlier representations:

    h = sum_n a_n v_n,    a = softmax_n( query . (key_norm_weight * v_n / rms(v_n)) )

The values are not normalised. Logits, softmax and the gradients of query and weight are computed in
fp32 (fp64 for fp64 sources); outputs have the sources' dtype.

``attention`` reads all sources for one sublayer. The pair ``depth_phase1`` / ``depth_phase2``
computes the same for the S sublayers of a block, reading the completed blocks once for all of them
and merging the running partial sum as it grows (Algorithm 1). Backward keeps references to sources
and outputs and a few scalars per token; the phase-1 outputs are not kept at all. CUDA tensors go to
Triton kernels where Triton is installed, all others to PyTorch (`_operators`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from attnres_train.model.depth.lean import DepthRead
from attnres_train.model.depth.two_phase import DepthMerge, DepthPhase1


class Phase1(NamedTuple):
    """One query's read of the completed blocks.

    ``query`` [D] is the query times its key norm weight, ``o`` [..., D] in the sources' dtype the
    softmax-weighted sum (normalised), ``lse`` [...] the log-sum-exp of its logits and ``logits``
    [..., N] the logits (no gradient); all but ``o`` are fp32 (fp64). The first sublayer of a block
    reads no partial: its input is ``o`` itself.
    """

    query: Tensor
    o: Tensor
    lse: Tensor
    logits: Tensor

    @property
    def weights(self) -> Tensor:
        """Attention weights [..., N] over the completed blocks, without gradient."""
        return self.logits.softmax(-1)


@overload
def depth_attention(
    query: Tensor,
    key_norm_weight: Tensor,
    sources: Sequence[Tensor],
    eps: float = ...,
    return_weights: Literal[False] = ...,
) -> Tensor: ...
@overload
def depth_attention(
    query: Tensor,
    key_norm_weight: Tensor,
    sources: Sequence[Tensor],
    eps: float = ...,
    *,
    return_weights: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def depth_attention(
    query: Tensor,
    key_norm_weight: Tensor,
    sources: Sequence[Tensor],
    eps: float = 1e-5,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The input of one sublayer from all its sources (Eq. 6), [..., D] in the sources' dtype.

    ``query`` and ``key_norm_weight`` are [D]; ``sources`` is any number of [..., D] tensors of one
    shape, dtype and device. A single source is returned as it is. With ``return_weights`` also the
    attention weights [..., N], fp32 (fp64), without gradient.

    Raises ValueError when there is no source or when shapes or dtypes differ.
    """
    _check([query, key_norm_weight], sources)
    folded = _fold(query, key_norm_weight, sources[0].dtype)
    if len(sources) == 1:
        # A softmax over one source is 1 whatever the query, which then gets no gradient.
        h, logits = sources[0], folded.new_zeros(1, sources[0][..., 0].numel())
    else:
        h, logits = _operators(folded).read(folded, eps, *sources)
    if not return_weights:
        return h
    return h, logits.softmax(0).T.reshape(*h.shape[:-1], len(sources))


def depth_phase1(
    queries: Sequence[tuple[Tensor, Tensor]], sources: Sequence[Tensor], eps: float = 1e-5
) -> list[Phase1]:
    """Reads the completed blocks for all S sublayers of a block at once.

    ``queries`` holds (query [D], key_norm_weight [D]) per sublayer, ``sources`` the completed
    blocks, [..., D] each. Returns one `Phase1` per sublayer. Its backward writes one gradient per
    source for all S queries. Outputs are separate tensors: drop each once used to free its memory.

    Raises ValueError when there is no query or source, or when shapes or dtypes differ.
    """
    if not queries:
        raise ValueError("depth_phase1 needs at least one (query, key_norm_weight) pair")
    count = len(queries)
    _check([vector for pair in queries for vector in pair], sources)
    vectors = torch.stack([query for query, _ in queries])
    weights = torch.stack([weight for _, weight in queries])
    folded = _fold(vectors, weights, sources[0].dtype)
    logits, *results = _operators(folded).phase1(folded, eps, *sources)
    outputs, lses = results[:count], results[count:]
    # Phase 2 gets its query from the folded ones too, so that the gradients of both phases add up
    # before they are taken back to query and weight.
    return list(map(Phase1, folded.unbind(), outputs, lses, logits.unbind(-2)))


@overload
def depth_phase2(
    completed: Phase1, partial: Tensor, eps: float = ..., return_weights: Literal[False] = ...
) -> Tensor: ...
@overload
def depth_phase2(
    completed: Phase1, partial: Tensor, eps: float = ..., *, return_weights: Literal[True]
) -> tuple[Tensor, Tensor]: ...
def depth_phase2(
    completed: Phase1, partial: Tensor, eps: float = 1e-5, return_weights: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Adds the running partial sum [..., D] to one query's read of the completed blocks.

    The online-softmax merge of Algorithm 1: equal to ``attention`` over the completed blocks
    and the partial. With ``return_weights`` also the attention weights [..., N+1], the partial's
    last.

    Raises ValueError when shapes or dtypes differ.
    """
    _check([completed.query], [completed.o, partial])
    merge = _operators(partial).merge
    h, logit = merge(completed.query, completed.o, completed.lse, partial, eps)
    if not return_weights:
        return h
    # The softmax over completed blocks and partial is that over all logits: phase 1's were kept.
    return h, torch.cat([completed.logits, logit.unsqueeze(-1)], -1).softmax(-1)


@torch.no_grad()
def depth_weights(
    query: Tensor, key_norm_weight: Tensor, sources: Sequence[Tensor], eps: float = 1e-5
) -> Tensor:
    """The weights alone, [..., N] in fp32 (fp64), without gradient, of a read by `depth_attention`
    with these arguments or by the two phases: to look at, for no read need keep them."""
    _check([query, key_norm_weight], sources)
    folded = _fold(query, key_norm_weight, sources[0].dtype)
    logits = []
    for source in sources:
        values = source.to(folded.dtype)
        inv_rms = values.square().mean(-1).add_(eps).rsqrt_()
        logits.append((values @ folded).mul_(inv_rms))
    return torch.stack(logits, -1).softmax(-1)


class _Operators(NamedTuple):
    """Differentiable functions with the arguments and results of `DepthRead.apply`,
    `DepthPhase1.apply` and `DepthMerge.apply`."""

    read: Callable[..., tuple[Tensor, Tensor]]
    phase1: Callable[..., tuple[Tensor, ...]]
    merge: Callable[..., tuple[Tensor, Tensor]]


def _operators(x: Tensor) -> _Operators:
    """Those for the device of ``x``. Triton is imported on first use on a GPU only."""
    if x.is_cuda:
        try:
            from attnres_train.model.depth.triton_functions import Merge, Phase1, depth_read
        except ModuleNotFoundError:
            pass  # no Triton; one that is there but broken raises, lest training be slow in silence
        else:
            return _Operators(depth_read, Phase1.apply, Merge.apply)
    return _Operators(DepthRead.apply, DepthPhase1.apply, DepthMerge.apply)


def _fold(query: Tensor, key_norm_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Query times key norm weight, in the dtype of the statistics: the logit of a source is then
    one dot product, scaled by the inverse RMS that all queries share."""
    # A bf16 logit near 100 is off by up to 0.25, and the weight by the exponential of that.
    dtype = torch.promote_types(dtype, torch.float32)
    return query.to(dtype) * key_norm_weight.to(dtype)


def _check(vectors: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if not sources:
        raise ValueError("depth attention needs at least one source")
    like = sources[0]
    for i, source in enumerate(sources):
        if source.shape != like.shape or source.dtype != like.dtype:
            raise ValueError(
                f"depth attention: source {i} is {tuple(source.shape)} {source.dtype}, "
                f"source 0 is {tuple(like.shape)} {like.dtype}"
            )
    for vector in vectors:
        if vector.shape != like.shape[-1:]:
            raise ValueError(
                f"depth attention: query and key_norm_weight must be [{like.shape[-1]}] like the "
                f"sources' last dimension, not {list(vector.shape)}"
            )
