"""A model chunk: a contiguous run of decoder layers, with the embedding before the first layer of
the model and the output head after the last. A whole model is one chunk.

Shapes: B samples, T tokens, S those of them in the stream here (T in one process), D hidden size,
V vocabulary, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from attnres_train.config.model_schema import ModelConfig
from attnres_train.model.batch import MicroBatch
from attnres_train.model.head import TokenLosses, linear_cross_entropy, token_losses
from attnres_train.model.layer import DecoderLayer
from attnres_train.model.norm import input_norm
from attnres_train.model.parameters import ParameterRule, normal
from attnres_train.model.ports import Ports
from attnres_train.model.probe import Probe, show_read
from attnres_train.model.residual.reads import Read
from attnres_train.model.residual.stream import build_residual
from attnres_train.model.walk import NO_PASTS, OnBlock, Pasts, Walk, tell

_OUTPUT_READ = "output_attn_res"  # prefix of the names of what the read of the head learns
_FP32_PARAMETERS = ("A_log", "dt_bias")  # decay: fp32 in the released checkpoint and in training


@dataclass
class ChunkOutput:
    """What a chunk hands on.

    ``blocks``: the blocks that it completed, [B, S, D] each (block 0, the embedding, is the first
    chunk's). ``partial``: the open block after it, [B, S, D], or None. ``loss``: of the last
    chunk, a scalar in fp32 (fp64); [G] where the batch has `MicroBatch.groups`.
    """

    blocks: dict[int, Tensor]
    partial: Tensor | None
    loss: Tensor | None


class ModelChunk(nn.Module):
    """Decoder layers ``first_layer .. last_layer - 1`` (0-based) of the model of ``config``.

    Parameters have the released names without ``model.`` and with routed experts stacked (see
    `naming`). They are meaningless until `init_weights` or a checkpoint fills them. ``dtype`` is
    theirs, but the decay of KDA, the router biases and all gradients, which add up over
    micro-batches, are fp32 at least. ``stream_dtype`` is the dtype of blocks and partials (default:
    ``dtype``), ``autocast_dtype`` that of matmuls (by torch.autocast; default: no autocast of its
    own). ``recompute`` is `train.recompute` (see `walk`). ``ports`` are the chunk's peers (default:
    none, everything is here).
    """

    def __init__(
        self,
        config: ModelConfig,
        first_layer: int,
        last_layer: int,
        *,
        recompute: str = "none",
        stream_dtype: torch.dtype | None = None,
        autocast_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        ports: Ports | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= first_layer <= last_layer <= config.num_layers:
            raise ValueError(
                f"layers {first_layer}..{last_layer} do not lie in a model of {config.num_layers}"
            )
        self.config = config
        self.ports = ports or Ports.of_one_process(config)
        self.vocabulary = self.ports.split.vocabulary(config.vocab_size)
        self.residual = build_residual(config)
        self.plan = self.residual.plan
        self.output_read = Read(self.residual, config.num_sublayers + 1, _OUTPUT_READ)
        self.first_layer, self.last_layer = first_layer, last_layer
        self._walk = Walk(self.residual, recompute)
        self.stream_dtype = stream_dtype
        self.autocast_dtype = autocast_dtype
        with torch.device(device or "cpu"):
            self._build()
        self.cast(dtype)

    def cast(self, dtype: torch.dtype) -> None:
        """Make the parameters ``dtype``, the decay of KDA fp32 at least, as all gradients."""
        for name, parameter in self.named_parameters():
            keep = name.endswith(_FP32_PARAMETERS)
            wanted = torch.promote_types(dtype, torch.float32) if keep else dtype
            parameter.data = parameter.data.to(wanted)
            parameter.grad_dtype = torch.promote_types(wanted, torch.float32)

    def _build(self) -> None:
        config, hidden = self.config, self.config.hidden_size
        if self.is_first:
            self.embed_tokens = self.vocabulary.embedding(hidden)
        self.layers = nn.ModuleDict(
            {
                str(i): DecoderLayer(config, i, self.ports)
                for i in range(self.first_layer, self.last_layer)
            }
        )
        if self.is_last:
            self.output_read.create(self)
            self.norm = input_norm(config)
            self.lm_head = self.ports.split.column(hidden, config.vocab_size)

    def parameter_rules(self, std: float) -> dict[str, ParameterRule]:
        """Of embedding, head and what the head's read learns. The first two are tables of vectors
        to the optimizer, no maps (Moonlight, arXiv 2502.16982, section 2.2)."""
        table = ParameterRule(normal(std), split=0)
        ends = dict.fromkeys(("embed_tokens.weight", "lm_head.weight"), table)
        return ends | self.output_read.rules()

    def read_rules(self) -> dict[str, ParameterRule]:
        """Rules of what all reads of the stream learn, by parameter name."""
        rules = self.output_read.rules() if self.is_last else {}
        for layer in self.decoder_layers:
            own = layer.parameter_rules(self.config.initializer_range)
            rules |= {f"layers.{layer.index}.{name}": rule for name, rule in own.items()}
        return rules

    def first_reader(self, name: str) -> nn.Module:
        """The module of the chunk whose forward pass begins before anything reads parameter
        ``name``: its layer, the final norm for itself and the head, the chunk for all else."""
        if name.startswith(("norm.", "lm_head.")):
            return self.norm
        _, *inside = name.split(".", 2)
        layer = self.layers[inside[0]] if name.startswith("layers.") else None
        # What a layer's reads learn is read with phase 1, before the layer runs.
        of_reads = isinstance(layer, DecoderLayer) and inside[1] in layer.parameter_rules(0.0)
        return self if layer is None or of_reads else layer

    @property
    def decoder_layers(self) -> list[DecoderLayer]:
        """The layers, in model order."""
        return cast("list[DecoderLayer]", list(self.layers.values()))

    @property
    def is_first(self) -> bool:
        """Whether the chunk holds the embedding."""
        return self.first_layer == 0

    @property
    def is_last(self) -> bool:
        """Whether the chunk holds the output head."""
        return self.last_layer == self.config.num_layers

    def forward(
        self,
        batch: MicroBatch,
        blocks: Mapping[int, Tensor],
        partial: Tensor | None,
        on_block: OnBlock | None = None,
    ) -> ChunkOutput:
        """Run the chunk on one micro-batch.

        ``blocks`` holds every block that is complete before the chunk, ``partial`` the open one
        (None if there is none, and for the first chunk). Neither is modified. ``on_block`` is given
        each block as soon as the layer that completes it is done. In a training forward (training
        mode, gradients on) the tokens of every routed expert are counted.

        Raises ValueError when ``blocks`` are not the ones the chunk reads.
        """
        with self._autocast(batch):
            sources, partial = self._run(batch, blocks, partial, on_block)
            completed = dict(enumerate(sources[len(blocks) :], len(blocks)))
            if not self.is_last:
                return ChunkOutput(completed, partial, loss=None)
            loss = linear_cross_entropy(
                self._output(sources, partial, batch.probe).flatten(0, 1),
                self.lm_head.get_parameter("weight"),
                batch.labels.flatten(),
                batch.loss_weights,
                divisor=batch.loss_tokens,
                vocabulary=self.vocabulary,
            )
            return ChunkOutput(completed, None, loss)

    def logits(
        self, batch: MicroBatch, blocks: Mapping[int, Tensor], partial: Tensor | None
    ) -> Tensor:
        """Like `forward` for the last chunk, but the logits [B, T, V] instead of the loss."""
        if not self.is_last:
            raise ValueError("only the chunk with the last layer has logits")
        with self._autocast(batch):
            return self._logits(*self._run(batch, blocks, partial), batch.probe)

    def go_on(
        self,
        batch: MicroBatch,
        blocks: Mapping[int, Tensor],
        partial: Tensor | None,
        pasts: Pasts,
    ) -> tuple[dict[int, Tensor], Tensor | None, Tensor | None]:
        """Run the chunk on tokens that go on from ``pasts``, which take them up; one for every
        layer. Depth attention needs none: a token reads nothing but its own blocks.

        Returns the blocks that it completed, the partial, and of the last chunk (else None) the
        logits [B, V] of the last token of every row.
        """
        with self._autocast(batch):
            sources, partial = self._run(batch, blocks, partial, pasts=pasts)
            completed = dict(enumerate(sources[len(blocks) :], len(blocks)))
            if not self.is_last:
                return completed, partial, None
            sources = [source[:, -1:] for source in sources]
            last = None if partial is None else partial[:, -1:]
            # Of ranks that share the stream each has a last one; the last of these is the rows'.
            return completed, None, self._logits(sources, last)[:, -1]

    def _logits(
        self, sources: Sequence[Tensor], partial: Tensor | None, probe: Probe | None = None
    ) -> Tensor:
        return self.vocabulary.join(self.lm_head(self._output(sources, partial, probe)))

    def token_losses(self, batch: MicroBatch) -> TokenLosses:
        """`score` of a whole model."""
        losses = self.score(batch, {}, None)[2] if self.is_first else None
        if losses is None:
            raise ValueError("only a whole model has losses of its own")
        return losses

    @torch.no_grad()
    def score(
        self, batch: MicroBatch, blocks: Mapping[int, Tensor], partial: Tensor | None
    ) -> tuple[dict[int, Tensor], Tensor | None, TokenLosses | None]:
        """Like `forward`, but with the loss of every token by itself, [B, T], whatever the mask.
        Returns the blocks that it completed, the partial, and the losses of the last chunk."""
        with self._autocast(batch):
            sources, partial = self._run(batch, blocks, partial)
            completed = dict(enumerate(sources[len(blocks) :], len(blocks)))
            if not self.is_last:
                return completed, partial, None
            found = token_losses(
                self._output(sources, partial, batch.probe).flatten(0, 1),
                self.lm_head.get_parameter("weight"),
                batch.labels.flatten(),
                vocabulary=self.vocabulary,
            )
        return completed, None, TokenLosses(*(x.view(batch.labels.shape) for x in found))

    def _autocast(self, batch: MicroBatch) -> AbstractContextManager:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(batch.tokens.device.type, self.autocast_dtype)

    def _run(
        self,
        batch: MicroBatch,
        blocks: Mapping[int, Tensor],
        partial: Tensor | None,
        on_block: OnBlock | None = None,
        pasts: Pasts = NO_PASTS,
    ) -> tuple[list[Tensor], Tensor | None]:
        """All blocks complete after the chunk's layers, and the open one."""
        sources = self._known_blocks(blocks)
        if self.is_first:
            embedding = self.embed_tokens(batch.tokens)
            embedding = embedding.to(self.stream_dtype or embedding.dtype)
            sources, partial = self.residual.start(embedding)
            tell(on_block, sources, 0)
            if batch.probe is not None:
                start = partial if partial is not None else sources[0]
                batch.probe.magnitude("stream", 0, start)
        return self._walk(self.decoder_layers, sources, partial, batch, on_block, pasts)

    def _output(
        self, sources: Sequence[Tensor], partial: Tensor | None, probe: Probe | None
    ) -> Tensor:
        """The input [B, T, D] of the head: the read of the whole stream, then the final norm."""
        reader, number = self.output_read.reader(self), self.output_read.sublayer
        if probe is not None:
            show_read(probe, self.residual, number, {number: reader}, sources, partial)
        h = self.residual.end(reader, sources, partial)
        return self.ports.split.gather(self.norm(h).to(self.norm.weight.dtype))

    def _known_blocks(self, blocks: Mapping[int, Tensor]) -> list[Tensor]:
        sublayer = 2 * self.first_layer + 1
        wanted = 0 if self.is_first else self.plan.completed_before(sublayer)
        if sorted(blocks) != list(range(wanted)):
            raise ValueError(
                f"the chunk of layers {self.first_layer}..{self.last_layer - 1} reads blocks "
                f"0..{wanted - 1}, but was given {sorted(blocks)}"
            )
        return [blocks[i] for i in range(wanted)]
