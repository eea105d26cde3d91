"""The kinds of residual stream that come with the package: what is to be known of each. What runs
them is in `stream` (standard), `attention_residuals` and `variants` (full, block), `dense_former`
and `hyper_connections`.

Shapes: D hidden size, N sources, H heads, m streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import factorial
from typing import TYPE_CHECKING, Any

from attnres_train.errors import UserError
from attnres_train.model.parameters import Initialiser, Learned, ParameterRule, constant
from attnres_train.model.residual.kind import ResidualKind

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from attnres_train.config.schema import RunConfig

_HERE = "attnres_train.model.residual."


class Standard(ResidualKind):
    """One running sum."""

    implementation = _HERE + "stream:Residual"

    def summary(self) -> str:
        return "standard: one running sum"

    def released(self) -> dict[str, Any]:
        return {}


class _Blocks(ResidualKind):
    """A residual with blocks."""

    def summary(self) -> str:
        sources = self.plan.num_blocks
        options = [f"; {key} {getattr(self.section, key)}" for key in self.section.variations]
        return (
            f"{self.name}: {self.model.num_sublayers} sublayers / {self.block_size} per block = "
            f"{sources - 1} blocks, + embedding = {sources} sources{''.join(options).lower()}"
        )


class Block(_Blocks):
    """Attention over sums of `block_size` sublayers (arXiv 2603.15031).

    A read learns a pseudo-query [1, D], zero at first, so that reads start as the mean of their
    sources (section 2), and a key norm [D]. Options other than the paper's choice (Table 4):

    - ``window`` W: embedding and W latest sources, the partial counts as one; the output too.
    - ``query: input``: W_l x, x the latest source with RMS 1 (the paper: "the current hidden
      state", which in its pseudo-code is the partial), W_l [D, D] zero at first.
    - ``scores: bias``: learned scalars [N, H], zero at first, in place of query and key.
    - ``normalizer: sigmoid``: every weight for itself, also of a single source.
    - ``key_norm: false``: keys are the values.
    - ``num_heads``: each head has its own weights for its channels; one norm over all.

    Two that came after the paper (github.com/kimmichtank/rms-block-attnres, docs/design.md), with
    N(y) = y / sqrt(mean(y^2) + norm_eps) per token, in fp32, without a weight:

    - ``values: key`` ("Full+RMS"): h = sum_i a_i k_i with the read's own keys k_i = w * N(v_i), of
      blocks, embedding and partial, in place of the v_i.
    - ``block_sum: unit_outputs`` ("RMS Block"): a completed block is sum_i N(y_i) of the outputs
      y_i of its sublayers, and not brought to RMS 1 itself. The open block is read as sum_i y_i,
      the embedding as it is. A partial holds both sums, [sum_i y_i, sum_i N(y_i)], 2 D numbers per
      token. (The source has an epsilon of 1e-6 there whatever that of the keys.)
    """

    @property
    def implementation(self) -> str:
        if self.section.variations:
            return _HERE + "variants:DepthVariants"
        return _HERE + "attention_residuals:AttentionResiduals"

    @property
    def block_size(self) -> int:
        return self.section.block_size

    @property
    def partial_units(self) -> int:
        return 2 if self.section.block_sum == "unit_outputs" else 1

    def check(self, config: RunConfig) -> Iterator[str]:
        options, hidden = self.section, self.model.hidden_size
        for key in options.variations:
            if options.scores == "bias" and key in ("query", "key_norm", "values"):
                yield (
                    f"{self._said(key)}, but with model.residual.scores bias there are neither "
                    "queries nor keys: remove one of the two"
                )
        if options.values == "key" and not options.key_norm:
            yield (
                f"{self._said('values')}, but with model.residual.key_norm false keys are the "
                "sources as they are: remove one of the two"
            )
        if hidden % options.num_heads:
            yield (
                f"model.residual.num_heads is {options.num_heads}, but model.hidden_size {hidden} "
                "is not divisible by it"
            )

    def learned(self, sublayer: int) -> dict[str, Learned]:
        options, hidden = self.section, self.model.hidden_size
        zero = constant(0.0)
        if options.scores == "bias":
            shape = (self._visible(sublayer), options.num_heads)
            return {"scores": Learned(shape, ParameterRule(zero, weight_decay=False))}
        if options.query == "input":
            query = ParameterRule(zero, is_matrix=True)
            learned = {"query.weight": Learned((hidden, hidden), query)}
        else:
            learned = {"proj.weight": Learned((1, hidden), ParameterRule(zero))}
        if options.key_norm:
            learned["norm.weight"] = Learned((hidden,), ParameterRule(constant(1.0)))
        return learned

    def flops(self, sublayer: int) -> float:
        """Square sum (of the key norm), logit and weighted sum of every source; of an output that
        is brought to RMS 1 the square sum, the scaling and the second sum."""
        options, hidden = self.section, self.model.hidden_size
        sources = self._visible(sublayer)
        writes = options.block_sum == "unit_outputs" and sublayer <= self.plan.num_sublayers
        written = 4 * hidden * writes
        if options.scores == "bias":
            return 2 * hidden * sources + written
        projection = 2 * hidden**2 if options.query == "input" else 0
        return projection + (4 + 2 * options.key_norm) * hidden * sources + written

    def released(self) -> dict[str, Any]:
        """``attn_res_block_size`` (Kimi-K3), in decoder layers."""
        self.check_exchange()
        layers, half = divmod(self.block_size, 2)
        if half:
            raise UserError(
                f"blocks of {self.block_size} sublayers (model.residual) cannot be exported: "
                "attn_res_block_size counts decoder layers of two sublayers each, so readers need "
                "an even model.residual.block_size"
            )
        return {"attn_res_block_size": layers}

    def check_exchange(self) -> None:
        if self.section.variations:
            raise self.unreleased(self.section.variations[0])

    def unsaid(self) -> Iterator[str]:
        if self.section.norm_eps != self.model.norm_eps:
            yield f"model.residual.norm_eps is {self.section.norm_eps:g}"

    def started_afresh(self) -> str:
        return (
            "Attention Residuals are not there and start afresh, queries at zero: reads are means "
            "of the blocks then, not their sum as in the released model, which has to be trained "
            "to fit"
        )

    def _visible(self, sublayer: int) -> int:
        """Sources that the read before ``sublayer`` sees."""
        sources, window = self.plan.num_sources(sublayer), self.section.window
        return sources if window is None else min(sources, 1 + window)


class Full(Block):
    """Attention over every sublayer output (arXiv 2603.15031): blocks of one sublayer."""

    @property
    def block_size(self) -> int:
        return 1


class DenseFormerKind(_Blocks):
    """DenseFormer (arXiv 2402.02622): before every decoder layer but the first, and at the end, an
    average of embedding and earlier layers by learned scalars [N], at first the identity."""

    implementation = _HERE + "dense_former:DenseFormer"

    @property
    def block_size(self) -> int:
        return 2  # the states after whole layers

    def learned(self, sublayer: int) -> dict[str, Learned]:
        if not self._averages(sublayer):
            return {}
        shape = (self.plan.num_sources(sublayer),)
        return {"weights": Learned(shape, ParameterRule(_last_is_one, weight_decay=False))}

    def flops(self, sublayer: int) -> float:
        sources = self.plan.num_sources(sublayer)
        return 2 * self.model.hidden_size * sources if self._averages(sublayer) else 0

    def _averages(self, sublayer: int) -> bool:
        return sublayer > 1 and self.plan.opens(sublayer)


def _last_is_one(tensor: Tensor, rng: Generator) -> None:
    tensor.zero_()[-1] = 1


class HyperConnectionsKind(ResidualKind):
    """Hyper-connections, mHC-lite (arXiv 2601.05732): `num_streams` streams, which every sublayer
    reads, mixes and writes by learned maps of their content.

    Formulas are in `hyper_connections`.
    """

    implementation = _HERE + "hyper_connections:HyperConnections"

    @property
    def num_streams(self) -> int:
        return self.section.num_streams

    @property
    def num_gates(self) -> int:
        """Outputs of the maps of a sublayer: m to read, m to write, m! permutations to mix."""
        return 2 * self.num_streams + factorial(self.num_streams)

    @property
    def stream_size(self) -> int:
        return self.num_streams * self.model.hidden_size

    def summary(self) -> str:
        return f"{self.name}: {self.num_streams} streams of {self.model.hidden_size}"

    def learned(self, sublayer: int) -> dict[str, Learned]:
        """W [2m + m!, m*D] is 0, its bias `_gate_bias`'s, the three scales are 0.01."""
        if sublayer > self.plan.num_sublayers:
            return {}
        gates, bias = self.num_gates, _gate_bias(sublayer, self.num_streams)
        return {
            "gates.weight": Learned((gates, self.stream_size), ParameterRule(constant(0.0))),
            "gates.bias": Learned((gates,), ParameterRule(bias, weight_decay=False)),
            "gate_scales": Learned((3,), ParameterRule(constant(0.01), weight_decay=False)),
        }

    def flops(self, sublayer: int) -> float:
        """Logits, read, mixing and write; for the output the sum alone."""
        if sublayer > self.plan.num_sublayers:
            return self.stream_size
        return 2 * self.stream_size * (self.num_gates + 1 + self.num_streams + 1)


def _gate_bias(sublayer: int, streams: int) -> Initialiser:
    """Lets a sublayer read and write one stream, another than the sublayer before, more than the
    rest (1 against -1), and keeps the streams nearly apart: 0 for the identity among the
    permutations, -8 for the others."""

    def fill(bias: Tensor, rng: Generator) -> None:
        home = (sublayer - 1) % streams
        bias[: 2 * streams] = -1
        bias[[home, streams + home]] = 1
        bias[2 * streams] = 0  # `permutations` yields the identity first
        bias[2 * streams + 1 :] = -8

    return fill
