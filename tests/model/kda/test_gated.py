"""KDA over rows that go on with a state, however it is computed, against one long row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnres_train.model.kda.gated import by_documents, continued_kda, gated_kda
from attnres_train.model.kda.inputs import DecayGate, KDAInputs

T, CUT, HEADS, KEY, VALUE = 20, 12, 2, 4, 3


def drawn() -> tuple[KDAInputs, DecayGate]:
    """A row of raw inputs, and a gate."""
    rng = torch.Generator().manual_seed(2)

    def of(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64, requires_grad=True)

    keys = (1, T, HEADS, KEY)
    raw = KDAInputs(of(*keys), of(*keys), of(1, T, HEADS, VALUE), of(*keys), of(1, T, HEADS))
    return raw, DecayGate(of(1, 1, HEADS, 1), of(HEADS * KEY), None)


def part(raw: KDAInputs, tokens: slice) -> KDAInputs:
    return KDAInputs(*(x[:, tokens] for x in raw))


@pytest.mark.parametrize("run", [continued_kda, by_documents])
@pytest.mark.parametrize("borders", [[], [5], [CUT], [3, CUT, 13, 19], [CUT + 7]])
def test_parts_are_a_whole(run, borders):
    raw, gate = drawn()
    starts = torch.zeros(1, T, dtype=torch.bool)
    starts[0, [0, *borders]] = True
    cu_seqlens = torch.tensor([0, *borders, T])
    expected = gated_kda(raw, gate, cu_seqlens=cu_seqlens, chunk_size=8)
    state = torch.zeros(1, HEADS, KEY, VALUE, dtype=torch.float64)
    outputs = []
    for tokens in (slice(0, CUT), slice(CUT, T)):
        o, state = run(part(raw, tokens), gate, state, starts[:, tokens], 8)
        outputs.append(o)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-12, atol=1e-13)
    weights = torch.randn(expected.shape, dtype=torch.float64)
    inputs = [*raw, gate.A_log, gate.dt_bias]
    grads = torch.autograd.grad((torch.cat(outputs, 1) * weights).sum(), inputs)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    for found, right in zip(grads, wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-11)


def test_rows_of_one_document_need_no_starts():
    raw, gate = drawn()
    state = torch.randn(1, HEADS, KEY, VALUE, dtype=torch.float64)
    found = continued_kda(raw, gate, state, None, 8)
    none = torch.zeros(1, T, dtype=torch.bool)
    for one, other in zip(found, by_documents(raw, gate, state, none, 8), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
