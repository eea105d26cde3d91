"""The look at a step: what each rank contributes, gathered on the main rank.

Of ranks that hold the same layers those with the first replica's samples show its first
micro-batch, each for its tokens; gradients are counted by their owners; of what all hold alike
(queries, loads) the first rank of every stage tells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from attnres_train.config.schema import RunConfig
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.probe import Probe, Totals
from attnres_train.observe.observed import Arrays, arrays_of
from attnres_train.optim.clipping import grad_square_sum
from attnres_train.parallel.gradients import sum_over
from attnres_train.parallel.owned import OwnedOptimizer
from attnres_train.parallel.ranks import Ranks
from attnres_train.pipeline.run.engine import StepResult


class Observation:
    """Looks at the steps that `observe.interval` asks for. All ranks do so at the same steps."""

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        chunks: Mapping[int, ModelChunk],
        optimizer: OwnedOptimizer,
    ) -> None:
        self.config, self.ranks = config, ranks
        self.chunks, self.optimizer = chunks, optimizer
        self.last_step: int | None = None
        """Which is observed, whatever the interval."""

    def probe(self, step: int) -> Probe | None:
        """For the first micro-batch of ``step``; None where nobody looks."""
        interval = self.config.observe.interval
        due = interval and (step % interval == 0 or step == self.last_step)
        return Probe() if due else None

    def gather(self, probe: Probe, result: StepResult, micro_batches: int) -> Arrays | None:
        """After the step's gradients are reduced, and before they are clipped: the arrays of all
        ranks (`observe.observed`), on the main rank alone. Collective."""
        totals = self._gradients() | self._loads()
        if self.ranks.data.rank() == 0:
            # The engine weighs a micro-batch's loss by one over their number.
            scale = float(micro_batches) ** 2
            totals |= {
                name: total * total.new_tensor([scale, 1]) if "gradient" in name else total
                for name, total in probe.totals.items()
            }
        if self.ranks.stage.rank() == 0:
            totals |= query_norms([*self.chunks.values()])
            store = [result.peak_blocks, result.peak_bytes]
            totals[f"store/{self.ranks.pp_rank}"] = torch.tensor(store, dtype=torch.float64)
        mine = {name: total.cpu().double().numpy() for name, total in totals.items()}
        rows: list[dict] = [{} for _ in range(self.ranks.world_size)]
        group = self.ranks.control
        dist.gather_object(mine, rows if self.ranks.is_main else None, dst=0, group=group)
        if not self.ranks.is_main:
            return None
        added: dict[str, np.ndarray] = {}
        for row in rows:
            for name, total in row.items():
                added[name] = added[name] + total if name in added else total
        return arrays_of(self.config.model, added)

    def _gradients(self) -> Totals:
        """Sums of squares of the gradients that are counted here, by sublayer."""
        of_sublayer: dict[int, list[Tensor]] = {}
        for piece in self.optimizer.reduction.pieces:
            if piece.counts_here:
                sublayer = sublayer_of(piece.parameter_name, self.config.model.num_sublayers)
                of_sublayer.setdefault(sublayer, []).append(piece.tensor)
        return {
            f"gradient/{sublayer}": grad_square_sum(tensors, self.ranks.device)
            for sublayer, tensors in of_sublayer.items()
        }

    def _loads(self) -> Totals:
        """Tokens per expert, over all replicas."""
        loads = {}
        for chunk in self.chunks.values():
            for layer in chunk.decoder_layers:
                if hasattr(layer, "block_sparse_moe"):
                    load = layer.block_sparse_moe.gate.tokens_per_expert.clone()
                    loads[f"expert_load/{layer.index}"] = sum_over(load, self.ranks.stage)
        return loads if self.ranks.stage.rank() == 0 else {}


@torch.no_grad()
def query_norms(chunks: Sequence[ModelChunk]) -> Totals:
    """Squared norms of what the reads of ``chunks`` choose their sources by."""
    totals = {}
    for chunk in chunks:
        owners = [(read, layer) for layer in chunk.decoder_layers for read in layer.reads]
        for read, owner in [*owners, *([(chunk.output_read, chunk)] if chunk.is_last else [])]:
            reader = read.reader(owner)
            query = None if reader is None else chunk.residual.query(reader)
            if query is not None:
                totals[f"query/{read.sublayer}"] = query.double().square().sum()
    return totals


_OF_ATTENTION = ("self_attn.", "input_layernorm.", "self_attention_res_")


def sublayer_of(name: str, num_sublayers: int) -> int:
    """The sublayer that a parameter, named as a chunk's are, belongs to; 0 for the embedding,
    ``num_sublayers + 1`` for the output head with its norm and read."""
    if not name.startswith("layers."):
        return 0 if name.startswith("embed_tokens.") else num_sublayers + 1
    _, layer, inside = name.split(".", 2)
    return 2 * int(layer) + (1 if inside.startswith(_OF_ATTENTION) else 2)
