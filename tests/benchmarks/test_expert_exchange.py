"""The contestants of the experts' benchmark compute the same, and send what is said of them."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

ARGS = Namespace(experts=8, chosen=3, hidden=16, width=8, skew=0.0, room=4.0)
TOKENS = 20


def both(folder: str) -> dict[str, tuple[Tensor, Tensor, int, int]]:
    """Output, gradient, bytes sent and (token, rank) pairs of each contestant, on one rank."""
    sys.path.insert(0, folder)
    import expert_exchange as benchmark

    found = {}
    for name, exchange in benchmark.make_exchanges(ARGS).items():
        moe = benchmark.make_layer(ARGS, exchange)
        torch.manual_seed(dist.get_rank())
        x = torch.randn(TOKENS, ARGS.hidden, requires_grad=True)
        y = moe(x)[0]
        y.square().sum().backward()
        least = benchmark.counted(moe, x, dist.get_world_size(), dist.get_rank())["least"]
        found[name] = y.detach(), x.grad, exchange.bytes_sent, int(least)
    return found


def test_contestants_agree(pool):
    by_rank = pool.run(both, 2, str(Path(__file__).parents[2] / "benchmarks"))
    for found in by_rank:
        (y, grad, _, least), *others = found.values()
        for other_y, other_grad, _, _ in others:
            torch.testing.assert_close(other_y, y)
            torch.testing.assert_close(other_grad, grad)
        assert 0 < least <= TOKENS
    sent = {name: sum(found[name][2] for found in by_rank) for name in by_rank[0]}
    least = 4 * ARGS.hidden * 4 * sum(found["exact"][3] for found in by_rank)
    # Beside tokens: 12 bytes of every pair in both directions together, and the sizes.
    assert least < sent["exact"] < 1.2 * least
    assert sent["per expert"] > 1.3 * least
    assert sent["bounded"] > sent["exact"]
