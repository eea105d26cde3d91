"""A micro-batch that is looked at: weights and magnitudes are those of the formulas, and nothing
that is trained changes by it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnres_train.config.model_schema import ModelConfig
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.probe import Probe
from tests.model.tiny import build, build_split, gradients, random_batch, run_split, tiny_config

KINDS = {
    "block": tiny_config(),
    "block, one by one": tiny_config(residual={"two_phase": False}),
    "full": tiny_config("full"),
    "window": tiny_config(residual={"window": 2}),
    "sigmoid": tiny_config(residual={"normalizer": "sigmoid"}),
    "heads": tiny_config(residual={"num_heads": 2}),
    "no key norm": tiny_config("full", residual={"key_norm": False}),
    "bias": tiny_config(residual={"scores": "bias"}),
    "input": tiny_config(residual={"query": "input"}),
    "unit sums": tiny_config(residual={"block_sum": "unit_outputs"}),
    "dense_former": tiny_config("dense_former"),
    "standard": tiny_config("standard"),
    "mhc_lite": tiny_config("mhc_lite"),
}


def chunks_of(config: ModelConfig, bounds: list[int], **options) -> list[ModelChunk]:
    """In fp64, no parameter of a read at its plain initial value."""
    chunks = build_split(config, bounds, dtype=torch.float64, **options)
    for chunk in chunks:
        with torch.no_grad():
            for name, parameter in chunk.named_parameters():
                if "_res_" in name and not name.endswith(".proj.weight"):
                    rng = torch.Generator().manual_seed(len(name) + sum(name.encode()))
                    noise = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
                    parameter.add_(0.3 * noise.to(parameter.dtype))
    return chunks


def train(chunks: list[ModelChunk], probe: Probe | None) -> tuple[Tensor, dict[str, Tensor]]:
    batch = replace(random_batch(), probe=probe)
    loss = run_split(chunks, batch).loss
    loss.backward()
    return loss, gradients(chunks)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_the_same_to_the_bit(kind, recompute):
    probe = Probe()
    loss, expected = train(chunks_of(KINDS[kind], [0, 2, 5], recompute=recompute), None)
    found, seen = train(chunks_of(KINDS[kind], [0, 2, 5], recompute=recompute), probe)
    assert torch.equal(found, loss)
    assert all(torch.equal(seen[name], gradient) for name, gradient in expected.items())
    assert {f"output_gradient/{i}" for i in range(1, 11)} <= probe.totals.keys()


def states(config: ModelConfig) -> tuple[ModelChunk, list[list[Tensor]]]:
    """A model, and the sources of every read of it, summed up from what its sublayers write."""
    (chunk,) = chunks_of(config, [0, 5])
    written = []

    def keep(module, args, output) -> None:
        written.append(output[0] if isinstance(output, tuple) else output)

    for layer in chunk.decoder_layers:
        layer.self_attn.register_forward_hook(keep)
        (layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe).register_forward_hook(keep)
    batch = random_batch()
    with torch.no_grad():
        chunk(batch, {}, None)
        blocks, partial, sources = [chunk.embed_tokens(batch.tokens)], None, []
        for sublayer, output in enumerate(written, 1):
            sources.append([*blocks, *([] if partial is None else [partial])])
            partial = output if partial is None else partial + output
            if sublayer % config.block_size == 0 or sublayer == len(written):
                blocks, partial = [*blocks, partial], None
        return chunk, [*sources, blocks]


def parameters(chunk: ModelChunk, sublayer: int) -> tuple[Tensor, Tensor]:
    """Query and key norm of a read, by their names."""
    layer, is_mlp = divmod(sublayer - 1, 2)
    prefix = f"layers.{layer}.{'mlp_res' if is_mlp else 'self_attention_res'}"
    if sublayer > 10:
        prefix = "output_attn_res"
    return (
        chunk.get_parameter(f"{prefix}_proj.weight").flatten(),
        chunk.get_parameter(f"{prefix}_norm.weight"),
    )


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("kind", ["block", "block, one by one", "full"])
def test_weights_are_an_independent_softmax(kind, recompute):
    config = KINDS[kind]
    chunk, sources = states(config)
    probe = Probe()
    train(chunks_of(config, [0, 2, 5], recompute=recompute), probe)
    eps = config.residual.norm_eps
    for sublayer, read in enumerate(sources, 1):
        query, norm = parameters(chunk, sublayer)
        logits = [
            ((norm * v / (v.pow(2).mean(-1, keepdim=True) + eps).sqrt()) * query).sum(-1)
            for v in read
        ]
        odds = [logit.exp() for logit in logits]
        weights = torch.stack([odd / sum(odds) for odd in odds], -1).flatten(0, 1)
        *sums, count = probe.totals[f"depth_weight/{sublayer}"]
        expected = torch.cat([weights.sum(0), weights.square().sum(0)])
        torch.testing.assert_close(torch.stack(sums), expected, rtol=1e-11, atol=1e-12)
        assert count == 40


@pytest.mark.parametrize("kind", ["window", "sigmoid", "heads", "bias", "input", "no key norm"])
def test_weights_of_variants_make_the_read(kind):
    """Where all channels share one weight, the weights mix the sources to what is read."""
    config = KINDS[kind]
    chunk, sources = states(config)
    for layer in chunk.decoder_layers:
        for read in layer.reads:
            reader, seen = read.reader(layer), sources[read.sublayer - 1]
            weights = chunk.residual.weights(read.sublayer, reader, seen)
            assert weights.shape == (2, 20, len(seen))
            if config.residual.num_heads == 1:
                mixed = sum(
                    w.unsqueeze(-1) * v for w, v in zip(weights.unbind(-1), seen, strict=True)
                )
                torch.testing.assert_close(mixed, reader.attend(seen), rtol=1e-11, atol=1e-12)
            else:
                torch.testing.assert_close(weights.sum(-1), torch.ones(2, 20).double())


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", ["block", "full", "standard"])
def test_magnitudes_are_those_of_what_sublayers_write(kind, recompute):
    expected = {}
    chunks = chunks_of(KINDS[kind], [0, 5], recompute="none")

    def watch(sublayer: int):
        def keep(module, args, output) -> None:
            y = output[0] if isinstance(output, tuple) else output
            expected[f"output/{sublayer}"] = y.detach().square().sum()
            y.register_hook(
                lambda g: expected.update({f"output_gradient/{sublayer}": g.square().sum()})
            )

        return keep

    for layer in chunks[0].decoder_layers:
        attention, mlp = layer.sublayers
        layer.self_attn.register_forward_hook(watch(attention))
        transform = layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe
        transform.register_forward_hook(watch(mlp))
    train(chunks, None)
    probe = Probe()
    train(chunks_of(KINDS[kind], [0, 2, 5], recompute=recompute), probe)
    assert len(expected) == 20
    for name, value in expected.items():
        square_sum, count = probe.totals[name]
        assert square_sum.item() == pytest.approx(value.item(), rel=1e-10), name
        assert count == 2 * 20 * 16


def test_the_stream_is_the_open_block_or_the_whole_sum():
    for kind in ("block", "standard"):
        config, probe = KINDS[kind], Probe()
        _, sources = states(KINDS["block"]) if kind == "block" else (None, None)
        (chunk,) = chunks_of(config, [0, 5])
        chunk(replace(random_batch(), probe=probe), {}, None)
        found = {i: probe.totals[f"stream/{i}"][0].item() for i in range(11)}
        if kind == "block":  # what the next read has as its last source
            ends = [len(read) - 1 for read in sources]
            last = [
                read[end].square().sum().item() for read, end in zip(sources, ends, strict=True)
            ]
            assert found == pytest.approx(dict(enumerate(last)), rel=1e-10)
        else:
            assert all(value > 0 for value in found.values())


def test_of_two_running_sums_the_stream_is_the_one_that_is_read():
    config, probe = KINDS["unit sums"], Probe()
    (chunk,) = chunks_of(config, [0, 5])
    chunk(replace(random_batch(), probe=probe), {}, None)
    counts = {probe.totals[f"stream/{sublayer}"][1].item() for sublayer in range(11)}
    assert counts == {2 * 20 * 16}
    # The first sublayer's output alone, as it is.
    torch.testing.assert_close(probe.totals["stream/1"], probe.totals["output/1"])
    # Its block is complete with the third: three vectors of RMS 1, of which none is much longer.
    assert 0 < probe.totals["stream/3"][0] <= 3**2 * 2 * 20 * 16


def test_bf16_is_looked_at_in_fp32():
    probe = Probe()
    chunk = build(tiny_config(), dtype=torch.bfloat16)
    chunk(replace(random_batch(), probe=probe), {}, None).loss.backward()
    for sublayer in range(1, 12):
        *sums, count = probe.totals[f"depth_weight/{sublayer}"]
        assert sum(sums[: len(sums) // 2]).item() == pytest.approx(count.item(), rel=1e-5)
