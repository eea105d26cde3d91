"""What every sublayer really reads, observed on a chunk whose sublayers emit one-hot markers.

Sublayer l emits the unit vector e_l and the embedding is e_0, whatever their input. With random
pseudo-queries the components of a read that came in one source have one weight, and other sources
have others: the input of a sublayer shows which outputs were summed into which source.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from attnres_train.config.model_schema import ModelConfig
from attnres_train.model.batch import MicroBatch
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.residual.attention_residuals import DepthStream
from tests.model.tiny import build, build_split, run_split, tiny_config

Sources = list[tuple[int, ...]]
OUTPUT = "output"


class Marker(nn.Module):
    """Stands for a sublayer: emits a unit vector for every token."""

    def __init__(self, component: int, size: int, *, is_moe: bool) -> None:
        super().__init__()
        self.is_moe = is_moe
        self.value = torch.zeros(size, dtype=torch.float64)
        self.value[component] = 1

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, past: object = None):
        marked = self.value.expand_as(x)
        return (marked, None) if self.is_moe else marked


def marker_config(layers: int, kind: str, block_size: int, **residual) -> ModelConfig:
    return tiny_config(
        kind, block_size, num_layers=layers, hidden_size=2 * layers + 1, residual=residual
    )


def observe(chunks: Sequence[ModelChunk]) -> dict[int | str, Tensor]:
    """The input of every sublayer and of the final norm, for one token, before its norm."""
    seen: dict[int | str, Tensor] = {}

    def watch(norm: nn.Module, key: int | str) -> None:
        norm.register_forward_pre_hook(lambda _, args: seen.update({key: args[0].flatten()}))

    for chunk in chunks:
        size = chunk.config.hidden_size
        for layer in chunk.layers.values():
            attention, mlp = layer.sublayers
            layer.self_attn = Marker(attention, size, is_moe=False)
            name = "mlp" if hasattr(layer, "mlp") else "block_sparse_moe"
            setattr(layer, name, Marker(mlp, size, is_moe=name != "mlp"))
            watch(layer.input_layernorm, attention)
            watch(layer.post_attention_layernorm, mlp)
    with torch.no_grad():
        chunks[0].embed_tokens.weight.copy_(torch.eye(chunks[0].config.hidden_size)[0])
    watch(chunks[-1].norm, OUTPUT)
    token = torch.zeros(1, 1, dtype=torch.int64)
    run_split(list(chunks), MicroBatch(token, token, torch.ones(1, 1)))
    return seen


def sources_of(read: Tensor) -> Sources:
    """Groups of components of equal, positive weight. The weights of all groups sum to one."""
    groups: dict[float, list[int]] = {}
    for component, weight in enumerate(read.tolist()):
        if weight:
            known = [w for w in groups if abs(w - weight) < 1e-12 * weight]
            groups.setdefault(known[0] if known else weight, []).append(component)
    assert abs(sum(groups) - 1) < 1e-12
    return sorted(tuple(group) for group in groups.values())


def equation_6(sublayer: int, block_size: int) -> Sources:
    """Finished blocks, the embedding alone being the first, and the open block if it has begun."""
    finished = (sublayer - 1) // block_size
    blocks = [tuple(range(n * block_size + 1, (n + 1) * block_size + 1)) for n in range(finished)]
    partial = tuple(range(finished * block_size + 1, sublayer))
    return [(0,), *blocks, *([partial] if partial else [])]


def output_sources(num_sublayers: int, block_size: int) -> Sources:
    starts = range(1, num_sublayers + 1, block_size)
    return [
        (0,),
        *(tuple(range(s, min(s + block_size, num_sublayers + 1))) for s in starts),
    ]


@pytest.mark.parametrize("two_phase", [True, False])
@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 6, 54])
def test_sources_of_the_48b_depth(block_size, two_phase):
    config = marker_config(27, "block", block_size, two_phase=two_phase)
    seen = observe([build(config, dtype=torch.float64)])
    for sublayer in range(1, 55):
        assert sources_of(seen[sublayer]) == equation_6(sublayer, block_size), sublayer
    assert sources_of(seen[OUTPUT]) == output_sources(54, block_size)


def test_table_of_the_48b_model():
    """Number of sources of the 54 sublayers with S = 6: 315 in all, and 10 for the output."""
    seen = observe([build(marker_config(27, "block", 6), dtype=torch.float64)])
    counts = [len(sources_of(seen[sublayer])) for sublayer in range(1, 55)]
    first_block, later = [1, 2, 2, 2, 2, 2], [[n, *[n + 1] * 5] for n in range(2, 10)]
    assert counts == sum(later, first_block)
    assert sum(counts) == 315
    assert len(sources_of(seen[OUTPUT])) == 10
    assert sources_of(seen[15]) == [(0,), (1, 2, 3, 4, 5, 6), (7, 8, 9, 10, 11, 12), (13, 14)]


@pytest.mark.parametrize("block_size", [2, 3, 4, 5, 7, 9, 11])
@pytest.mark.parametrize("bounds", [[0, 5], [0, 1, 2, 3, 4, 5], [0, 2, 3, 5]])
def test_sources_with_a_short_last_block_in_any_chunks(block_size, bounds):
    config = marker_config(5, "block", block_size)
    seen = observe(build_split(config, bounds, dtype=torch.float64))
    for sublayer in range(1, 11):
        assert sources_of(seen[sublayer]) == equation_6(sublayer, block_size)
    assert sources_of(seen[OUTPUT]) == output_sources(10, block_size)


def test_full_reads_every_output_by_itself():
    seen = observe([build(marker_config(3, "full", 6), dtype=torch.float64)])
    for sublayer in range(1, 7):
        assert sources_of(seen[sublayer]) == [(i,) for i in range(sublayer)]
    assert sources_of(seen[OUTPUT]) == [(i,) for i in range(7)]


def test_standard_residual_is_the_running_sum():
    chunks = build_split(marker_config(3, "standard", 6), [0, 1, 3], dtype=torch.float64)
    seen = observe(chunks)
    for sublayer in range(1, 7):
        expected = [1.0] * sublayer + [0.0] * (7 - sublayer)
        assert seen[sublayer].tolist() == expected
    assert seen[OUTPUT].tolist() == [1.0] * 7


@pytest.mark.parametrize("two_phase", [True, False])
@pytest.mark.parametrize("block_size", [1, 3, 6])
def test_zero_queries_read_the_mean(block_size, two_phase):
    chunk = build(marker_config(6, "block", block_size, two_phase=two_phase), dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in chunk.named_parameters():
            if name.endswith("_res_proj.weight"):
                parameter.zero_()
    seen = observe([chunk])
    for sublayer in range(1, 13):
        sources = equation_6(sublayer, block_size)
        mean = torch.zeros(13, dtype=torch.float64)
        for source in sources:
            mean[list(source)] = 1 / len(sources)
        torch.testing.assert_close(seen[sublayer], mean, rtol=1e-14, atol=1e-14)


def test_stream_leaves_its_inputs_alone():
    chunk = build(tiny_config("block", 3), 2, 3)  # sublayers 5 and 6: inside and end of block 2
    blocks = [torch.randn(1, 4, 16) for _ in range(2)]
    partial = torch.randn(1, 4, 16)
    copies = [x.clone() for x in (*blocks, partial)]
    stream = DepthStream(
        chunk.plan, chunk.layers["2"].depth_readers(), blocks, partial, two_phase=True
    )
    for sublayer in (5, 6):
        stream.write(sublayer, torch.ones_like(stream.read(sublayer)))
    assert len(blocks) == 2
    assert len(stream.blocks) == 3
    assert stream.partial is None
    torch.testing.assert_close(stream.blocks[2], copies[2] + 2)
    assert all(torch.equal(x, y) for x, y in zip((*blocks, partial), copies, strict=True))
