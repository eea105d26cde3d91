"""A decoder layer: two sublayers (attention, MLP), each with a norm and a read of the stream."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attnres_train.config.model_schema import ModelConfig
from attnres_train.model.kda.layer import KimiDeltaAttention
from attnres_train.model.mla import MultiHeadLatentAttention
from attnres_train.model.mlp import SwiGLU
from attnres_train.model.moe.layer import MixtureOfExperts
from attnres_train.model.norm import input_norm
from attnres_train.model.parameters import ParameterRule
from attnres_train.model.ports import Past, Ports
from attnres_train.model.probe import ProbedStream
from attnres_train.model.residual.reads import Read
from attnres_train.model.residual.stream import ResidualStream, build_residual

_READS = ("self_attention_res", "mlp_res")
"""Prefixes of the names of what the two reads learn."""


class DecoderLayer(nn.Module):
    """Decoder layer ``index`` (0-based): sublayers ``2 * index + 1`` and ``2 * index + 2``.

    Attention is KDA or MLA, the MLP dense (`mlp`) or experts (`block_sparse_moe`), by the config.
    What the two reads of the stream learn, if anything, is up to the residual's kind. ``ports`` are
    the layer's peers (default: none).
    """

    def __init__(self, config: ModelConfig, index: int, ports: Ports | None = None) -> None:
        super().__init__()
        ports = ports or Ports.of_one_process(config)
        hidden = config.hidden_size
        self.config, self.index = config, index
        self.input_layernorm = input_norm(config)
        self.self_attn: MultiHeadLatentAttention | KimiDeltaAttention
        if config.is_full_attention(index):
            self.self_attn = MultiHeadLatentAttention(
                hidden, config.mla, ports.split, ports.sequence
            )
        else:
            self.self_attn = KimiDeltaAttention(
                hidden, config.kda, config.norm_eps, ports.split, ports.sequence
            )
        self.post_attention_layernorm = input_norm(config)
        if config.is_dense(index):
            self.mlp = SwiGLU(hidden, config.intermediate_size, ports.split)
        else:
            self.block_sparse_moe = MixtureOfExperts(
                hidden, config.moe, ports.exchange, ports.split
            )
        residual = build_residual(config)
        self.reads = [
            Read(residual, sublayer, prefix)
            for sublayer, prefix in zip(self.sublayers, _READS, strict=True)
        ]
        for read in self.reads:
            read.create(self)

    @property
    def sublayers(self) -> tuple[int, int]:
        """Numbers of the attention and the MLP, from 1 over the whole model."""
        return 2 * self.index + 1, 2 * self.index + 2

    def depth_readers(self) -> dict[int, Any]:
        """The layer's reads that learn something, by sublayer."""
        readers = {read.sublayer: read.reader(self) for read in self.reads}
        return {sublayer: reader for sublayer, reader in readers.items() if reader is not None}

    def parameter_rules(self, std: float) -> dict[str, ParameterRule]:
        """Of what the two reads learn."""
        return {name: rule for read in self.reads for name, rule in read.rules().items()}

    def forward(
        self,
        stream: ResidualStream | ProbedStream,
        cu_seqlens: Tensor | None,
        past: Past | None = None,
    ) -> Tensor | None:
        """Read, transform, write, twice. ``past`` is what the layer goes on from (None: nothing).
        Returns the router's load, int64 [E] (None when dense)."""
        attention, mlp = self.sublayers
        x = stream.read_normed(attention, self.input_layernorm)
        stream.write(attention, self.self_attn(x, cu_seqlens, past))
        x = stream.read_normed(mlp, self.post_attention_layernorm)
        y, load = (self.mlp(x), None) if hasattr(self, "mlp") else self.block_sparse_moe(x)
        stream.write(mlp, y)
        return load
