"""Kimi-Linear with Attention Residuals for transformers, from 5.24 on:

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Attention, experts and caches are transformers' own `kimi_linear`. Here are the residual stream of
arXiv 2603.15031, in which a sublayer reads a softmax-weighted sum of earlier blocks, and what that
model has no key for: the epsilon of the latent's norm, and the decay of KDA with a lower bound.
Without `attn_res_block_size` the stream is one running sum.

Shapes: B batch, T tokens, D hidden size, N sources of a read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import KimiLinearConfig, KimiLinearForCausalLM, KimiLinearModel
from transformers.cache_utils import DynamicCache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.kimi_linear.modeling_kimi_linear import (
    KimiLinearDecoderLayer,
    KimiLinearForgetGate,
    KimiLinearRMSNorm,
)


class AttnResConfig(KimiLinearConfig):
    """Keys beside those of Kimi-Linear. ``attn_res_block_size`` counts decoder layers."""

    model_type = "kimi_linear_attnres"
    attn_res_block_size: int | None = None
    attn_res_norm_eps: float = 1e-5
    kv_norm_eps: float = 1e-6

    @property
    def gate_lower_bound(self) -> float | None:
        return (getattr(self, "linear_attn_config", None) or {}).get("gate_lower_bound")

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """What transformers' own class opens as well has that one's ``model_type`` in its file, by
        which the weights of code that is not its own would not be renamed."""
        found, others = super().get_config_dict(*args, **kwargs)
        return found | {"model_type": cls.model_type}, others


# The names of the weights are those of Kimi-Linear.
register_checkpoint_conversion_mapping(
    AttnResConfig.model_type, get_checkpoint_conversion_mapping("kimi_linear"), overwrite=True
)


class BoundedForgetGate(KimiLinearForgetGate):
    """The log-decay of KDA, above a lower bound: bound * sigmoid(exp(A_log) (f(x) + dt_bias))."""

    def __init__(self, config: AttnResConfig) -> None:
        super().__init__(config)
        self.lower_bound = float(config.gate_lower_bound or 0.0)

    def forward(self, hidden_states: Tensor) -> Tensor:
        raw = self.f_b_proj(self.f_a_proj(hidden_states)).float() + self.dt_bias.float()
        raw = raw.unflatten(-1, (self.num_heads, self.head_dim))
        return self.lower_bound * torch.sigmoid(self.A_log.float().exp() * raw)


def depth_attention(query: nn.Linear, norm: KimiLinearRMSNorm, sources: list[Tensor]) -> Tensor:
    """The softmax over N sources [B, T, D] of query . norm(source), and the sum of the sources
    (not normalised) by it; statistics in fp32. A single source is itself."""
    if len(sources) == 1:
        return sources[0]
    folded = query.weight[0].float() * norm.weight.float()
    stacked = torch.stack(sources).float()
    scale = torch.rsqrt(stacked.square().mean(-1) + norm.variance_epsilon)
    weights = ((stacked @ folded) * scale).softmax(0)
    return (weights.unsqueeze(-1) * stacked).sum(0).to(sources[0].dtype)


class Stream:
    """The residual stream: finished ``blocks`` and the open one, ``partial``, [B, T, D] each.
    Without blocks the partial alone is the stream."""

    def __init__(self, embedding: Tensor, sublayers_per_block: int | None) -> None:
        self.size = sublayers_per_block
        self.blocks: list[Tensor] = [embedding] if self.size else []
        self.partial: Tensor | None = None if self.size else embedding
        self.written = 0

    def sources(self) -> list[Tensor]:
        return self.blocks if self.partial is None else [*self.blocks, self.partial]

    def write(self, output: Tensor) -> None:
        self.partial = output if self.partial is None else self.partial + output
        self.written += 1
        if self.size and self.written % self.size == 0:
            self.blocks, self.partial = [*self.blocks, self.partial], None


class AttnResDecoderLayer(KimiLinearDecoderLayer):
    """Attention and MLP, each of which reads the stream and writes to it."""

    def __init__(self, config: AttnResConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if self.block_type == "full_attention":
            self.self_attn.kv_a_layernorm.variance_epsilon = config.kv_norm_eps
        elif config.gate_lower_bound is not None:
            self.self_attn.forget_gate = BoundedForgetGate(config)
        self.reads = config.attn_res_block_size is not None
        if self.reads:
            size, eps = config.hidden_size, config.attn_res_norm_eps
            self.self_attention_res_proj = nn.Linear(size, 1, bias=False)
            self.self_attention_res_norm = KimiLinearRMSNorm(size, eps)
            self.mlp_res_proj = nn.Linear(size, 1, bias=False)
            self.mlp_res_norm = KimiLinearRMSNorm(size, eps)

    def forward(self, stream: Stream, **attention: Any) -> Stream:
        sources = stream.sources()
        if self.reads:
            x = depth_attention(self.self_attention_res_proj, self.self_attention_res_norm, sources)
        else:
            (x,) = sources
        found = self.self_attn(hidden_states=self.input_layernorm(x), **attention)
        stream.write(found[0] if isinstance(found, tuple) else found)
        sources = stream.sources()
        if self.reads:
            x = depth_attention(self.mlp_res_proj, self.mlp_res_norm, sources)
        else:
            (x,) = sources
        stream.write(self.mlp(self.post_attention_layernorm(x)))
        return stream


class AboutAttnRes:
    """What transformers asks a class of models."""

    config_class = AttnResConfig
    _no_split_modules = ["AttnResDecoderLayer"]  # noqa: RUF012  (as transformers has it)
    _can_record_outputs: dict[str, Any] = {}  # noqa: RUF012
    supports_gradient_checkpointing = False

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Experts are transformers' own, which by default are a grouped matmul. Whether they are is
        otherwise guessed from the text of this file, and each expert would run by itself."""
        return True


class AttnResModel(AboutAttnRes, KimiLinearModel):
    def __init__(self, config: AttnResConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(
            AttnResDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        if config.attn_res_block_size is not None:
            self.output_attn_res_proj = nn.Linear(config.hidden_size, 1, bias=False)
            self.output_attn_res_norm = KimiLinearRMSNorm(
                config.hidden_size, config.attn_res_norm_eps
            )
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds")
        embedding = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(
                seen, seen + embedding.shape[1], device=embedding.device
            ).unsqueeze(0)
        masks = {
            kind: make(
                config=self.config,
                inputs_embeds=embedding,
                attention_mask=attention_mask,
                cache=cache,
                position_ids=position_ids,
            )
            for kind, make in (
                ("full_attention", create_causal_mask),
                ("linear_attention", create_recurrent_attention_mask),
            )
        }
        layers_per_block = self.config.attn_res_block_size
        stream = Stream(embedding, layers_per_block and 2 * layers_per_block)
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            stream = layer(stream, attention_mask=masks[kind], cache=cache, **kwargs)
        sources = stream.sources()
        if layers_per_block:
            x = depth_attention(self.output_attn_res_proj, self.output_attn_res_norm, sources)
        else:
            (x,) = sources
        return MoeModelOutputWithPast(last_hidden_state=self.norm(x), cache=cache)


class AttnResForCausalLM(AboutAttnRes, KimiLinearForCausalLM):
    # The decay, too: its exponential is taken.
    _keep_in_fp32_modules_strict = [  # noqa: RUF012
        "e_score_correction_bias",
        "gate.weight",
        "dt_bias",
        "A_log",
    ]

    def __init__(self, config: AttnResConfig) -> None:
        super().__init__(config)
        self.model = AttnResModel(config)
        self.post_init()
