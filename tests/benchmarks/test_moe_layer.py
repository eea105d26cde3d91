"""The contestants of the benchmark of one MoE layer compute the same."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch

ARGS = Namespace(experts=8, chosen=3, hidden=16, width=8)


def test_contestants_agree(benchmarks):
    import moe_layer

    layers = moe_layer.make_layers(ARGS, torch.float32)
    x = torch.randn(20, ARGS.hidden, requires_grad=True)
    assert moe_layer.that_run(layers, x, torch.randn_like(x))[:2] == ["ours", "loop"]
    with torch.no_grad():
        layers["loop"].experts.w2[3] *= 1.01
    with pytest.raises(AssertionError, match="loop computes another result"):
        moe_layer.that_run(layers, x, torch.randn_like(x))
