"""A model whose samples are shared by ranks, against the same model and plain autograd."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from attnres_train.model.batch import MicroBatch
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.flops import mean_document_length
from attnres_train.model.init import init_weights
from attnres_train.model.ports import AllHere, Ports
from attnres_train.model.shares import Shares
from attnres_train.parallel.context import ContextExchange, sequence_exchange
from attnres_train.parallel.shares import Scan, ShareGroup
from tests.model.tiny import tiny_config

LENGTH, SAMPLES = 24, 2  # shares of 6 tokens on two ranks, of 4 on three
BORDERS = {
    "whole": None,
    "crossing": [0, 5, 7, 23, 24, 31, 48],
    "at-cuts": [0, 4, 6, 8, 12, 24, 36, 40, 42, 48],
    "of-a-token": [0, 1, 2, 5, 6, 7, 11, 12, 13, 23, 24, 25, 48],
    "spanning": [0, 3, 24, 46, 48],
    "empty": [0, 0, 12, 12, 20, 48, 48],
    "no-border-between-samples": [0, 10, 30, 48],
}
CONFIG = tiny_config("block", num_layers=3, full_attention_layers=[2])
Found = dict[str, Tensor]


def batch(borders: list[int] | None) -> MicroBatch:
    generator = torch.Generator().manual_seed(1)
    shape = (SAMPLES, LENGTH)
    tokens, labels = (torch.randint(CONFIG.vocab_size, shape, generator=generator) for _ in "ab")
    mask = (torch.rand(shape, generator=generator) < 0.7).double()
    cu_seqlens = None if borders is None else torch.tensor(borders, dtype=torch.int32)
    return MicroBatch(tokens, labels, mask, cu_seqlens, mask.sum())


def chunk(ports: Ports | None, recompute: str) -> ModelChunk:
    model = ModelChunk(
        CONFIG, 0, CONFIG.num_layers, dtype=torch.float64, ports=ports, recompute=recompute
    )
    init_weights(model, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def loss_and_gradients(model: ModelChunk, of_batch: MicroBatch) -> Found:
    loss = model(of_batch, {}, None).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def on_a_rank(recompute: str) -> dict[str, Found]:
    """Losses and gradients summed over the ranks, by borders."""
    sequence = sequence_exchange(dist.group.WORLD)
    ports = Ports(AllHere(CONFIG.moe.num_experts), sequence=sequence)
    results = {}
    for name, borders in BORDERS.items():
        here = batch(borders).of(sequence.shares)
        results[name] = loss_and_gradients(chunk(ports, recompute), here)
        for tensor in results[name].values():
            dist.all_reduce(tensor)
    return results


@pytest.fixture(scope="module")
def alone() -> dict[str, Found]:
    return {
        name: loss_and_gradients(chunk(None, "none"), batch(borders))
        for name, borders in BORDERS.items()
    }


@pytest.mark.parametrize(("ranks", "recompute"), [(2, "none"), (3, "full")])
def test_losses_and_gradients_are_those_of_one_process(pool, alone, ranks, recompute):
    found = pool.run(on_a_rank, ranks, recompute)[0]
    for name, expected in alone.items():
        for key, value in expected.items():
            error = (found[name][key] - value).norm() / value.norm().clamp(min=1e-9)
            assert error < 1e-11, (name, key)


@pytest.mark.parametrize("borders", BORDERS.values(), ids=BORDERS)
def test_documents_are_as_long_as_in_whole_samples(borders):
    whole, shares = batch(borders), Shares(4, (1, 2))
    assert mean_document_length(whole.of(shares), shares) == mean_document_length(whole)


def test_a_part_needs_the_tokens_of_the_whole():
    whole = batch(None)
    whole.loss_tokens = None
    with pytest.raises(ValueError, match="loss_tokens"):
        whole.of(Shares(4, (0, 3)))


def exchanged() -> list[tuple[int, int]]:
    """What every rank has of random samples, by each method against plain indexing: values, and
    gradients of a sum over all ranks. Returns the bytes sent forward and backward."""
    sequence, sent = ContextExchange(dist.group.WORLD), []
    shares = sequence.shares
    torch.manual_seed(7)  # the same on all ranks
    whole = torch.randn(SAMPLES, LENGTH, 3, dtype=torch.float64, requires_grad=True)
    here = shares.of(whole.detach()).requires_grad_()
    size = LENGTH // shares.count

    def check(got: Tensor, expected: Tensor) -> None:
        assert torch.equal(got, expected)
        forward = sequence.bytes_sent
        (mine,) = torch.autograd.grad((got**3).sum(), here)
        (of_all,) = torch.autograd.grad((expected**3).sum(), whole)
        dist.all_reduce(of_all)
        torch.testing.assert_close(mine, shares.of(of_all), rtol=1e-14, atol=1e-14)
        sent.append((forward, sequence.bytes_sent - forward))
        sequence.peers.bytes_sent = 0

    rows = shares.rows(here)
    padded = F.pad(whole, (0, 0, 2, 0))
    led = [padded[:, share * size : (share + 1) * size + 2] for share in shares.own]
    got = sequence.led([rows[..., :1], rows[..., 1:]], 2)
    check(torch.cat(got, -1), torch.stack(led, dim=1).flatten(0, 1))
    got = sequence.gather([here[..., :2], here[..., 2:]])
    check(torch.cat(got, -1), whole[:, : (shares.own[-1] + 1) * size])
    return sent


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_ranks_have_of_each_other(pool, ranks):
    neighbours = [2 if 0 < rank < ranks - 1 else 1 for rank in range(ranks)]
    fronts = SAMPLES * 2 * 3 * 8  # two tokens of three numbers
    latents = SAMPLES * LENGTH // ranks * 3 * 8 * (ranks - 1)
    for sent, peers in zip(pool.run(exchanged, ranks), neighbours, strict=True):
        assert sent == [(peers * fronts, peers * fronts), (latents, latents)]


def states() -> int:
    """States in front of the shares by `Scan`, against plain autograd. Returns the bytes sent."""
    peers = ShareGroup(dist.group.WORLD)
    torch.manual_seed(7)
    ends_and_maps = torch.randn(SAMPLES, peers.shares.count, 2, 4, 3 + 4, dtype=torch.float64)
    mine = ends_and_maps[:, list(peers.shares.own)].requires_grad_()
    entering = Scan.apply(peers, mine)
    (entering**3).sum().backward()
    whole = ends_and_maps.clone().requires_grad_()
    state, expected = torch.zeros(SAMPLES, 2, 4, 3, dtype=torch.float64), []
    for share in whole.unbind(1):
        expected.append(state)
        state = share[..., 3:] @ state + share[..., :3]
    expected = torch.stack(expected, 1)
    (expected**3).sum().backward()
    own = list(peers.shares.own)
    torch.testing.assert_close(entering, expected[:, own], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(mine.grad, whole.grad[:, own], rtol=1e-12, atol=1e-12)
    return peers.bytes_sent


@pytest.mark.parametrize("ranks", [2, 3])
def test_states_are_those_of_a_scan_in_one_process(pool, ranks):
    numbers = (
        (ranks - 1) * SAMPLES * 2 * 2 * 4 * ((4 + 3) + 3)
    )  # maps and ends; gradients of states
    assert pool.run(states, ranks) == [numbers * 8] * ranks
