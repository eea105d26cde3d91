"""Multi-head latent attention against a per-head, per-token reference in fp64."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from attnres_train.config.model_schema import MLAConfig
from attnres_train.model.mla import (
    MultiHeadLatentAttention,
    causal_attention,
    document_lengths,
)

CONFIG = MLAConfig(
    num_heads=3, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5
)
HIDDEN = 14


@pytest.fixture
def layer() -> MultiHeadLatentAttention:
    torch.manual_seed(0)
    layer = MultiHeadLatentAttention(HIDDEN, CONFIG).double()
    torch.nn.init.normal_(layer.kv_a_layernorm.weight)
    return layer


def reference(layer: MultiHeadLatentAttention, x: torch.Tensor) -> torch.Tensor:
    """One sequence [T, D]: keys and values per head from the normalised latent, shared key dims."""
    weights = {name: p.detach() for name, p in layer.named_parameters()}
    heads, nope, shared, value, rank = 3, 6, 4, 5, 10
    compressed = x @ weights["kv_a_proj_with_mqa.weight"].T
    latent, key_shared = compressed[:, :rank], compressed[:, rank:]
    latent = latent / torch.sqrt((latent**2).mean(-1, keepdim=True) + 1e-5)
    latent = latent * weights["kv_a_layernorm.weight"]
    outputs = []
    for head in range(heads):
        q_rows = slice(head * (nope + shared), (head + 1) * (nope + shared))
        kv_rows = slice(head * (nope + value), (head + 1) * (nope + value))
        q = x @ weights["q_proj.weight"][q_rows].T
        kv = latent @ weights["kv_b_proj.weight"][kv_rows].T
        rows = []
        for t in range(len(x)):
            scores = torch.stack(
                [q[t, :nope] @ kv[s, :nope] + q[t, nope:] @ key_shared[s] for s in range(t + 1)]
            )
            p = torch.softmax(scores * 10**-0.5, 0)
            rows.append(sum(p[s] * kv[s, nope:] for s in range(t + 1)))
        outputs.append(torch.stack(rows))
    return torch.cat(outputs, -1) @ weights["o_proj.weight"].T


def test_equals_reference(layer):
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    expected = torch.stack([reference(layer, sample) for sample in x])
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_values_wider_than_keys():
    torch.manual_seed(1)
    config = CONFIG.model_copy(update={"v_head_dim": 24})
    layer = MultiHeadLatentAttention(HIDDEN, config)
    y = layer(torch.randn(1, 4, HIDDEN))
    assert y.shape == (1, 4, HIDDEN)
    assert y.isfinite().all()


def test_released_shapes_of_the_48b_layer():
    with torch.device("meta"):
        layer = MultiHeadLatentAttention(2304, MLAConfig())
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "q_proj.weight": (6144, 2304),
        "kv_a_proj_with_mqa.weight": (576, 2304),
        "kv_a_layernorm.weight": (512,),
        "kv_b_proj.weight": (8192, 512),
        "o_proj.weight": (2304, 4096),
    }


@pytest.mark.parametrize("borders", [[0, 3, 8, 9, 16], [0, 3, 9, 9, 16, 16], [0, 16]], ids=str)
def test_packed_documents_equal_separate_ones(layer, borders):
    """Two samples of eight tokens: a document ends with its sample, whatever ``borders`` say."""
    lengths = document_lengths(torch.tensor(borders), 2, 8)
    assert sum(lengths) == 16
    x = torch.randn(2, 8, HIDDEN, dtype=torch.float64, requires_grad=True)
    packed = layer(x, torch.tensor(borders, dtype=torch.int32)).view(16, HIDDEN)
    documents = x.view(16, HIDDEN).split(lengths)
    separate = torch.cat([layer(document[None])[0] for document in documents])
    torch.testing.assert_close(packed, separate, rtol=1e-12, atol=1e-12)
    dy, variables = torch.randn_like(packed), [x, *layer.parameters()]
    got, wanted = (torch.autograd.grad(y, variables, dy) for y in (packed, separate))
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def test_document_lengths():
    assert document_lengths(torch.tensor([0, 3, 3, 10, 16]), 2, 8) == [3, 5, 2, 6]
    assert document_lengths(torch.tensor([0, 8]), 1, 8) == [8]


def test_the_work_is_that_of_the_documents():
    """No pair of tokens of two documents is multiplied: FLOPs of 16 documents of 16 tokens."""
    q, k, v = torch.empty(3, 2, 128, 2, 8, device="meta")
    with FlopCounterMode(display=False) as packed:
        causal_attention(q, k, v, torch.arange(0, 257, 16))
    with FlopCounterMode(display=False) as separate:
        causal_attention(*(x.reshape(16, 16, 2, 8) for x in (q, k, v)), None)
    assert packed.get_total_flops() == separate.get_total_flops() > 0


def test_is_causal(layer):
    x = torch.randn(1, 6, HIDDEN, dtype=torch.float64)
    changed = x.clone()
    changed[:, 4:] += 1
    before, after = layer(x), layer(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=0, atol=1e-14)
    assert (before[:, 4:] - after[:, 4:]).abs().amax() > 1e-3
