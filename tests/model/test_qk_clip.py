"""QK-clip of one layer, against logits by plain einsum, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnres_train.config.model_schema import MLAConfig
from attnres_train.model import logits
from attnres_train.model.logits import largest_logits
from attnres_train.model.mla import MultiHeadLatentAttention
from attnres_train.model.qk_clip import row_factors, watched
from attnres_train.model.shares import Shares

CONFIG = MLAConfig(
    num_heads=3, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5
)
HIDDEN, LENGTH = 14, 12
BORDERS = torch.tensor([0, 1, 5, 12, 12, 17, 24], dtype=torch.int32)


def allowed(length: int, borders: Tensor | None) -> Tensor:
    """[B, T, T] of two samples: the query's row, the key's column."""
    places = torch.arange(2 * length)
    document = places // length
    for border in [] if borders is None else borders.tolist():
        document = document + 2 * (places >= border)
    same = document.unsqueeze(1) == document
    pairs = same & (places.unsqueeze(1) >= places)
    return torch.stack([pairs[:length, :length], pairs[length:, length:]])


def by_einsum(q: Tensor, k: Tensor, borders: Tensor | None) -> Tensor:
    every = torch.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    outside = ~allowed(q.shape[1], borders).unsqueeze(1)
    return every.masked_fill(outside, -torch.inf).amax((0, 2, 3))


@pytest.fixture
def qk() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, LENGTH, 3, 7, dtype=torch.float64)
    k[:, 4] *= 20  # the last of a document
    k[:, 11] *= 50  # what only the last token sees
    return q, k


@pytest.mark.parametrize("borders", [None, BORDERS], ids=["whole", "packed"])
@pytest.mark.parametrize(("rows", "tile"), [(512, 2**18), (5, 1), (4, 100)])
def test_the_largest_logit_is_that_of_all_allowed_pairs(qk, monkeypatch, borders, rows, tile):
    monkeypatch.setattr(logits, "_TILE_ROWS", rows)
    monkeypatch.setattr(logits, "_CPU_TILE", tile)
    found = largest_logits(*qk, borders)
    torch.testing.assert_close(found, by_einsum(*qk, borders), rtol=1e-14, atol=0)


@pytest.mark.parametrize("borders", [None, BORDERS], ids=["whole", "packed"])
def test_shares_find_together_what_is_found_alone(qk, borders):
    q, k = qk
    parts = []
    for own in ((0, 3), (1, 2)):
        shares = Shares(4, own)
        seen = k[:, : (own[-1] + 1) * LENGTH // 4]
        parts.append(largest_logits(shares.of(q), seen, borders, shares))
    expected = by_einsum(q, k, borders)
    torch.testing.assert_close(torch.maximum(*parts), expected, rtol=1e-14, atol=0)


def test_what_is_not_allowed_would_be_found(qk):
    q, k = qk
    every = torch.einsum("bthk,bshk->bhts", q, k).amax((0, 2, 3)) / 7**0.5
    whole, packed = by_einsum(q, k, None), by_einsum(q, k, BORDERS)
    assert (every > whole).any() and (whole > packed).any()


def largest(layer: MultiHeadLatentAttention, x: Tensor) -> Tensor:
    assert layer.max_logits is not None
    layer.max_logits.fill_(-torch.inf)
    layer(x, BORDERS)
    return layer.max_logits.clone()


def test_a_head_over_the_threshold_comes_down_to_it_and_nothing_else_changes():
    torch.manual_seed(0)
    layer = MultiHeadLatentAttention(HIDDEN, CONFIG).double()
    layers = watched(torch.nn.ModuleDict({"attention": layer}))
    x = 3 * torch.randn(2, LENGTH, HIDDEN, dtype=torch.float64)
    before = largest(layer, x)
    threshold = before.sort().values[:2].mean().item()  # two heads are above it
    above = before > threshold
    factors = row_factors(layers, threshold)
    weights = {f"attention.{name}": p.detach().clone() for name, p in layer.named_parameters()}
    with torch.no_grad():
        for name, factor in factors.items():
            layer.get_parameter(name.removeprefix("attention.")).mul_(factor)
    after = largest(layer, x)
    torch.testing.assert_close(
        after[above], torch.full((2,), threshold, dtype=torch.float64), rtol=1e-13, atol=0
    )
    assert torch.equal(after[~above], before[~above])
    changed = {
        n for n, p in layer.named_parameters() if not torch.equal(p, weights[f"attention.{n}"])
    }
    assert changed == {"q_proj.weight", "kv_b_proj.weight"}, "the key that heads share stays"
    q = (layer.q_proj.weight / weights["attention.q_proj.weight"]).view(3, 10, HIDDEN)
    kv = (layer.kv_b_proj.weight / weights["attention.kv_b_proj.weight"]).view(3, 11, 10)
    for head in range(3):
        gamma = min(1.0, threshold / before[head].item())
        for part, factor in (
            (q[head, :6], gamma**0.5),
            (q[head, 6:], gamma),
            (kv[head, :6], gamma**0.5),
        ):
            torch.testing.assert_close(part, torch.full_like(part, factor), rtol=1e-14, atol=0)
        assert (kv[head, 6:] == 1).all(), "values stay"


def test_negative_logits_are_below_any_threshold():
    layer = MultiHeadLatentAttention(HIDDEN, CONFIG)
    layers = watched(layer)
    layer.max_logits = torch.tensor([-3.0, 5.0, 0.0], dtype=torch.float64)
    q = row_factors(layers, 10.0)
    assert all((factors == 1).all() for factors in q.values())


def test_only_training_is_watched():
    layer = MultiHeadLatentAttention(HIDDEN, CONFIG)
    layer(torch.randn(1, 4, HIDDEN))
    assert layer.max_logits is None and "max_logits" not in layer.state_dict()
    watched(layer)
    with torch.no_grad():
        layer(torch.randn(1, 4, HIDDEN))
    layer.eval()(torch.randn(1, 4, HIDDEN))
    assert (layer.max_logits == -torch.inf).all()
    assert "max_logits" not in layer.state_dict(), "nothing of it is saved"
    layer.train()(torch.randn(1, 4, HIDDEN))
    assert layer.max_logits.isfinite().all()
