"""The model section of a run's configuration (SPEC: Kimi Linear with Attention Residuals)."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from attnres_train.config.kind_fields import KindName, KindOptions, OptionsOf
from attnres_train.config.kinds import NoOptions, resolve
from attnres_train.config.section import Section


class ResidualConfig(Section):
    kind: Annotated[str, KindName("model.residual.kind")] = "block"
    """Residual stream: `standard` PreNorm sum, `full` attention over every sublayer output,
    `block` attention over sums of `block_size` sublayers; for comparison `dense_former`, averages
    of layers by learned scalars, and `mhc_lite`, hyper-connections of `num_streams` streams."""
    block_size: int = Field(6, ge=1)
    """Sublayers per block (attention and MLP count one each); read for `kind: block` only."""
    norm_eps: float = Field(1e-5, gt=0)
    """Epsilon of the RMSNorm on the keys of depth attention."""
    two_phase: bool = True
    """Read completed blocks once per block (paper, Alg. 1) instead of once per sublayer; the
    variants below are read once per sublayer."""
    window: int | None = Field(None, ge=1)
    """Sliding window: only the embedding and this many latest sources are read."""
    query: Literal["static", "input"] = "static"
    """Query of a read: `static`, a learned vector; `input`, a projection of the latest source."""
    scores: Literal["key", "bias"] = "key"
    """What weighs the sources: `key`, query times key, or `bias`, learned scalars alone."""
    normalizer: Literal["softmax", "sigmoid"] = "softmax"
    """Weights from scores: `softmax` over the sources, or a `sigmoid` of each."""
    key_norm: bool = True
    """RMSNorm on the keys of depth attention."""
    num_heads: int = Field(1, ge=1)
    """Heads of depth attention, with weights of their own for their channels."""
    values: Literal["source", "key"] = "source"
    """What a read mixes: each `source` as it is, or its `key`, which has RMS 1 but for the key
    norm's weight."""
    block_sum: Literal["outputs", "unit_outputs"] = "outputs"
    """What a completed block is the sum of: sublayer `outputs`, or `unit_outputs`, each with RMS 1
    (the open block stays the sum of outputs)."""
    norm_gate_rank: int | None = Field(None, ge=1)
    """Rank of a learned gate on the norm of what every sublayer and the output head read
    (GatedNorm: 16); none by default. For every kind."""
    num_streams: int = Field(4, ge=2, le=6)
    """Streams of `kind: mhc_lite`; it learns a weight for each of their permutations."""
    options: Annotated[KindOptions, OptionsOf("model.residual.kind")] = Field(
        default_factory=NoOptions, validate_default=True
    )
    """Options that a kind of your own declares."""

    @property
    def variations(self) -> list[str]:
        """Keys of depth attention whose values are not the paper's choice."""
        attention = ("window", "query", "scores", "normalizer", "key_norm", "num_heads")
        fields, keys = type(self).model_fields, (*attention, "values", "block_sum")
        return [key for key in keys if getattr(self, key) != fields[key].default]


class KDAConfig(Section):
    num_heads: int = Field(32, ge=1)
    """Heads of Kimi Delta Attention."""
    head_dim: int = Field(128, ge=1)
    """Key and value size per head."""
    short_conv_kernel_size: int = Field(4, ge=1)
    """Taps of the causal depthwise convolutions on q, k and v."""
    chunk_size: int = Field(64, ge=1)
    """Tokens per chunk of the chunked form, a power of two."""
    gate: Literal["softplus", "lower_bound"] = "softplus"
    """Log of the decay: `softplus` -exp(A_log) softplus(a + dt_bias), as in Kimi-Linear;
    `lower_bound` b sigmoid(exp(A_log) (a + dt_bias)) with b = `gate_lower_bound`, as in Kimi-K3."""
    gate_lower_bound: float = Field(-5.0, lt=0)
    """Strongest log-decay of a token; read for `gate: lower_bound` only."""

    @field_validator("chunk_size")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("must be a power of two")
        return value

    @property
    def lower_bound(self) -> float | None:
        """Lower bound of the log-decay; None for the softplus gate, which has none."""
        return self.gate_lower_bound if self.gate == "lower_bound" else None


class MLAConfig(Section):
    num_heads: int = Field(32, ge=1)
    """Heads of multi-head latent attention (no rotary embedding)."""
    kv_lora_rank: int = Field(512, ge=1)
    """Size of the normalised key/value latent."""
    qk_nope_head_dim: int = Field(128, ge=1)
    """Query/key size per head that is expanded from the latent."""
    qk_rope_head_dim: int = Field(64, ge=0)
    """Key size shared by all heads; kept in the score, never rotated."""
    v_head_dim: int = Field(128, ge=1)
    """Value size per head."""
    kv_norm_eps: float = Field(1e-5, gt=0)
    """Epsilon of the latent's RMSNorm (1e-6 reproduces the released remote code)."""


class StagedMoE(Section):
    """What a stage of a run may have of its own."""

    bias_update_rate: float = Field(1e-3, ge=0)
    """Step of the auxiliary-loss-free bias update of the router; 0 turns it off."""


class MoEConfig(StagedMoE):
    num_experts: int = Field(256, ge=1)
    """Routed experts per MoE layer."""
    num_experts_per_token: int = Field(8, ge=1)
    """Routed experts that each token uses (top-k)."""
    num_shared_experts: int = Field(1, ge=0)
    """Shared experts; their widths add up in one SwiGLU."""
    intermediate_size: int = Field(1024, ge=1)
    """Hidden width of every expert."""
    routed_scaling_factor: float = Field(2.446, gt=0)
    """Factor on the renormalised routing weights."""
    first_dense_layers: int = Field(1, ge=0)
    """Leading decoder layers with a dense MLP instead of experts."""

    def reached(self, ranks: int) -> float:
        """Share of the tokens that have an expert on one of ``ranks`` ranks, of whose experts each
        is as likely as any other."""
        elsewhere = self.num_experts - self.num_experts // ranks
        chosen = self.num_experts_per_token
        return 1 - math.comb(elsewhere, chosen) / math.comb(self.num_experts, chosen)


class ModelConfig(Section):
    hidden_size: int = Field(ge=1)
    """Width d of the residual stream."""
    num_layers: int = Field(ge=1, le=10_000)
    """Decoder layers; each is two sublayers (attention, MLP)."""
    vocab_size: int = Field(ge=2)
    """Rows of embedding and output head; at least the tokenizer's size."""
    intermediate_size: int = Field(9216, ge=1)
    """Hidden width of the dense MLPs."""
    full_attention_interval: int = Field(4, ge=1)
    """Every n-th layer and the last one are MLA, the others KDA."""
    full_attention_layers: list[int] | None = None
    """MLA layers, counted from 1 as in the released config; replaces `full_attention_interval`."""
    norm_eps: float = Field(1e-5, gt=0)
    """Epsilon of every RMSNorm without its own."""
    initializer_range: float = Field(0.02, gt=0)
    """Standard deviation of linear and embedding weights at initialisation."""
    residual: ResidualConfig = Field(default_factory=ResidualConfig)
    """The residual stream."""
    kda: KDAConfig = Field(default_factory=KDAConfig)
    """Kimi Delta Attention."""
    mla: MLAConfig = Field(default_factory=MLAConfig)
    """Multi-head latent attention."""
    moe: MoEConfig = Field(default_factory=MoEConfig)
    """Mixture of experts."""

    def is_full_attention(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` (0-based) is MLA rather than KDA."""
        if self.full_attention_layers is not None:
            return layer + 1 in self.full_attention_layers
        return (layer + 1) % self.full_attention_interval == 0 or layer == self.num_layers - 1

    def is_dense(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` (0-based) has a dense MLP rather than experts."""
        return layer < self.moe.first_dense_layers

    @property
    def num_sublayers(self) -> int:
        return 2 * self.num_layers

    @property
    def block_size(self) -> int | None:
        """Sublayers per block; None for a stream without blocks (see `model.blocks.Blocks`)."""
        return self.residual_kind.block_size

    @property
    def stream_size(self) -> int:
        """Numbers per token of a block or partial: what crosses a pipeline boundary."""
        return self.residual_kind.stream_size

    @property
    def residual_kind(self) -> Any:
        """The `ResidualKind`, which lies above: found by name, never imported by this module."""
        return resolve("model.residual.kind", self.residual.kind)(self)
