"""QK-clip on grids of processes, against logits by plain einsum and weights scaled by hand."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from attnres_train.model.mla import MultiHeadLatentAttention
from attnres_train.model.qk_clip import row_factors
from attnres_train.parallel.owned import OwnedOptimizer
from attnres_train.training.qk_clip import QKClip
from attnres_train.training.trainer import Trainer
from tests.parity.steps import STEPS, Steps, differences, run_steps
from tests.tiny import free_port, grid

RELATIVE = 1e-9
THRESHOLD = 0.03
COMMON = [
    "model.full_attention_layers=[2,4]",
    "optimizer.ns_dtype=fp64",
    "optimizer.lr=0.001",
    "optimizer.eps=1e-6",
    "train.micro_batch_size=1",
    "data.reset_at_documents=true",
    "data.mask_document_ends=true",
]


class Grid(NamedTuple):
    """Replicas, ranks that share tensors, and samples, stages, virtual stages, and more."""

    data: int = 1
    tensor: int = 1
    context: int = 1
    stages: int = 1
    virtual: int = 1
    more: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        return self.data * self.tensor * self.context * self.stages


FULL = ("train.recompute=full",)
WHOLE = ("optimizer.sharded=false",)
GRIDS = {
    "one": Grid(),
    "one-full": Grid(more=FULL),
    "DP2": Grid(data=2),
    "TP2": Grid(tensor=2),
    "CP2": Grid(context=2),
    "PP2V2": Grid(stages=2, virtual=2, more=FULL),
    "DP2-replicated": Grid(data=2, more=WHOLE),
    "DP2-selective": Grid(data=2, more=("train.recompute=selective",)),
    "DP2-TP2-PP2": Grid(data=2, tensor=2, stages=2),
    "TP2-CP2": Grid(tensor=2, context=2, more=FULL),
    "DP2-CP2": Grid(data=2, context=2, more=WHOLE),
}
OFTEN = ("one", "TP2", "CP2", "PP2V2")
CASES = [
    pytest.param(place, kind, marks=[pytest.mark.nightly] * (place not in OFTEN or kind == "muon"))
    for place in GRIDS
    for kind in ("adamw", "muon")  # replicas own rows of what AdamW updates, and matrices else
]


class ByHand:
    """What every head's logits come to, from the inputs of its layer, and its weights scaled."""

    def __init__(self, chunk: nn.Module) -> None:
        layers = [m for m in chunk.modules() if isinstance(m, MultiHeadLatentAttention)]
        self.largest = {layer: torch.zeros(layer.heads).double() for layer in layers}
        self.factors: list[float] = []
        for layer in layers:
            layer.register_forward_pre_hook(self.look)

    @torch.no_grad()
    def look(self, layer: MultiHeadLatentAttention, inputs: tuple[Tensor, Tensor, None]) -> None:
        if not layer.training:
            return
        (x, borders, _), c, heads = inputs, layer.config, layer.heads
        q = (x @ layer.q_proj.weight.T).unflatten(-1, (heads, -1))
        down = x @ layer.kv_a_proj_with_mqa.weight.T
        latent, shared = down[..., : c.kv_lora_rank], down[..., c.kv_lora_rank :]
        rms = (latent.square().mean(-1, keepdim=True) + c.kv_norm_eps).rsqrt()
        expanded = (latent * rms * layer.kv_a_layernorm.weight) @ layer.kv_b_proj.weight.T
        nope = expanded.unflatten(-1, (heads, -1))[..., : c.qk_nope_head_dim]
        size = c.qk_nope_head_dim
        logits = torch.einsum("bthk,bshk->bhts", q[..., :size], nope)
        logits += torch.einsum("bthk,bsk->bhts", q[..., size:], shared)
        length = x.shape[1]
        places = torch.arange(len(x) * length).view(len(x), length)
        document = torch.bucketize(places, borders.long(), right=True)
        pairs = document.unsqueeze(2) == document.unsqueeze(1)
        pairs &= places.unsqueeze(2) >= places.unsqueeze(1)
        logits = logits.masked_fill(~pairs.unsqueeze(1), -torch.inf) / q.shape[-1] ** 0.5
        self.largest[layer] = torch.maximum(self.largest[layer], logits.amax((0, 2, 3)))

    @torch.no_grad()
    def clip(self) -> None:
        for layer, largest in self.largest.items():
            c = layer.config
            nope, key = c.qk_nope_head_dim, c.qk_nope_head_dim + c.qk_rope_head_dim
            for head in range(layer.heads):
                gamma = min(1.0, THRESHOLD / largest[head].item())
                self.factors.append(gamma)
                q = layer.q_proj.weight[head * key : (head + 1) * key]
                q[:nope] *= gamma**0.5
                q[nope:] *= gamma
                start = head * (nope + c.v_head_dim)
                layer.kv_b_proj.weight[start : start + nope] *= gamma**0.5
        for largest in self.largest.values():
            largest.zero_()


def by_hand(patch: pytest.MonkeyPatch) -> None:
    made = Trainer.__init__

    def init(self, config, ranks, parts, *more):
        made(self, config, ranks, parts, *more)
        (chunk,) = parts.chunks.values()
        hand, step = ByHand(chunk), parts.optimizer.step

        def clipped(lr, *_):
            step(lr)
            hand.clip()
            if len(hand.factors) == STEPS * 4:
                told = sorted(hand.factors)
                assert told[0] < 0.95 and told[-1] == 1, told  # some heads are, and some are not

        patch.setattr(parts.optimizer, "step", clipped)

    patch.setattr(Trainer, "__init__", init)


@pytest.fixture(scope="module")
def run(pool, tiny):
    """Steps by rank, of a grid; the same ones are run once."""

    @cache
    def steps(place: str, kind: str, threshold: float = THRESHOLD, fault=None) -> list[Steps]:
        on = GRIDS[place]
        arguments = [
            *COMMON,
            *grid(on.stages, on.virtual),
            f"parallel.tensor_model_parallel_size={on.tensor}",
            f"parallel.context_parallel_size={on.context}",
            f"optimizer.kind={kind}",
            f"optimizer.qk_clip={threshold}",
            *on.more,
        ]
        return pool.run(run_steps, on.ranks, str(tiny.path), arguments, free_port(), STEPS, fault)

    return steps


@pytest.mark.parametrize(("place", "kind"), CASES)
def test_three_steps_equal_what_is_done_by_hand(run, place, kind):
    (expected,) = run("one", kind, 0, by_hand)
    assert differences(run(place, kind), expected, RELATIVE) == []


def look_at_own_samples(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(QKClip, "factors", lambda self: row_factors(self.layers, self.threshold))


def clip_after_the_gather(patch: pytest.MonkeyPatch) -> None:
    """What replicas are sent is not scaled yet."""
    step = OwnedOptimizer.step

    def late(self, lr, row_factors):
        step(self, lr)
        self.wait()
        for piece in self.reduction.pieces:
            if piece.is_mine and piece.parameter_name in row_factors:
                self.optimizer.scale(piece.name, piece.of(row_factors[piece.parameter_name]))

    patch.setattr(OwnedOptimizer, "step", late)


@pytest.mark.nightly
@pytest.mark.parametrize("fault", [look_at_own_samples, clip_after_the_gather])
def test_faults_are_found(run, fault):
    (expected,) = run("one", "muon", 0, by_hand)
    told = differences(run("DP2", "muon", THRESHOLD, fault), expected, RELATIVE)
    assert any("q_proj" in line or "kv_b_proj" in line for line in told), told
