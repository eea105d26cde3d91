"""A model in one chunk, in several, recomputed or not: one function and one gradient."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch

from attnres_train.model.chunk import ModelChunk
from attnres_train.model.depth.attention import depth_phase1
from attnres_train.model.init import init_weights
from attnres_train.model.moe.layer import router_loads
from tests.model.tiny import (
    VOCABULARY,
    assert_same_gradients,
    build,
    build_split,
    gradients,
    random_batch,
    run_split,
    tiny_config,
)

RESIDUALS = [("standard", 1), ("full", 1), ("block", 2), ("block", 3), ("block", 4), ("block", 10)]


def loss_and_gradients(config, bounds=(0, 5), **options):
    chunks = build_split(config, list(bounds), dtype=torch.float64, **options)
    output = run_split(chunks, random_batch())
    output.loss.backward()
    return output.loss.detach(), gradients(chunks)


@pytest.mark.parametrize(("kind", "block_size"), RESIDUALS)
@pytest.mark.parametrize("bounds", [(0, 2, 5), (0, 1, 2, 3, 4, 5)])
def test_split_model_equals_the_whole(kind, block_size, bounds):
    config = tiny_config(kind, block_size)
    loss, grads = loss_and_gradients(config)
    split_loss, split_grads = loss_and_gradients(config, bounds)
    torch.testing.assert_close(split_loss, loss, rtol=1e-13, atol=0)
    assert_same_gradients(split_grads, grads, rtol=1e-11)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "residual", [{}, {"two_phase": False}, {"query": "input"}, {"kind": "mhc_lite"}], ids=str
)
def test_parameters_are_read_after_their_first_reader_begins(residual, recompute):
    config = tiny_config(residual=residual)
    chunk = build(config, dtype=torch.float64, recompute=recompute)
    expected = chunk(random_batch(), {}, None).loss
    late = 0

    def restore(parameter, values):
        def hook(*_):
            parameter.data.copy_(values)

        return hook

    for name, parameter in chunk.named_parameters():
        values, reader = parameter.detach().clone(), chunk.first_reader(name)
        late += reader is not chunk
        parameter.data.fill_(math.nan)
        reader.register_forward_pre_hook(restore(parameter, values))
    assert late > 40  # those of layers, but for what their reads learn
    assert torch.equal(chunk(random_batch(), {}, None).loss, expected)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "residual", [{}, {"two_phase": False}, {"query": "input"}, {"kind": "mhc_lite"}], ids=str
)
def test_gradients_come_backwards_but_those_of_reads(residual, recompute):
    """What the reduction of gradients counts on: buckets leave in this order."""
    config = tiny_config(residual=residual)
    chunk = build(config, dtype=torch.float64, recompute=recompute)
    came, late = [], chunk.read_rules()

    def note(layer):
        return lambda _: came.append(layer)

    for name, parameter in chunk.named_parameters():
        if name not in late:
            ends = {"embed_tokens": -1, "norm": config.num_layers, "lm_head": config.num_layers}
            first, second, *_ = name.split(".")
            layer = int(second) if first == "layers" else ends[first]
            parameter.register_post_accumulate_grad_hook(note(layer))
    chunk(random_batch(), {}, None).loss.backward()
    assert set(came) == set(range(-1, config.num_layers + 1))
    assert came == sorted(came, reverse=True)


@pytest.mark.parametrize(("kind", "block_size"), RESIDUALS)
@pytest.mark.parametrize("bounds", [(0, 5), (0, 2, 5)])
def test_recomputation_changes_nothing(kind, block_size, bounds):
    config = tiny_config(kind, block_size)
    loss, grads = loss_and_gradients(config, bounds)
    again_loss, again = loss_and_gradients(config, bounds, recompute="full")
    torch.testing.assert_close(again_loss, loss, rtol=1e-13, atol=0)
    assert_same_gradients(again, grads, rtol=1e-11)
    # The same operations on the same blocks: equal to the last bit.
    again_loss, again = loss_and_gradients(config, bounds, recompute="selective")
    assert torch.equal(again_loss, loss)
    assert_same_gradients(again, grads, rtol=0)


@pytest.mark.parametrize("kind", ["dense_former", "mhc_lite"])
def test_selective_recomputation_of_the_residuals_of_comparison(kind):
    config = tiny_config(kind, 2)
    loss, grads = loss_and_gradients(config, (0, 2, 5))
    again_loss, again = loss_and_gradients(config, (0, 2, 5), recompute="selective")
    assert torch.equal(again_loss, loss)
    assert_same_gradients(again, grads, rtol=0)


@pytest.mark.parametrize("two_phase", [True, False])
def test_selective_recomputation_reads_the_same_blocks(two_phase, monkeypatch):
    """Phase 1 runs once in each pass for all reads of a block, on the very blocks that came in."""
    runs = []

    def noting(queries, sources, eps):
        runs.append([source.data_ptr() for source in sources])
        return depth_phase1(queries, sources, eps)

    monkeypatch.setattr("attnres_train.model.depth.shared_reads.depth_phase1", noting)
    config = tiny_config("block", 4, residual={"two_phase": two_phase})
    chunk = build(config, 2, 4, recompute="selective")  # sublayers 5 to 8: one block
    blocks = {i: torch.randn(2, 20, 16, requires_grad=True) for i in range(2)}
    output = chunk(random_batch(), blocks, None)
    torch.autograd.backward([output.blocks[2]], [torch.ones(2, 20, 16)])
    assert runs == [[blocks[0].data_ptr(), blocks[1].data_ptr()]] * (2 if two_phase else 0)
    assert all(block.grad.count_nonzero() > 0 for block in blocks.values())


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_graph_without_backward_pass_is_freed(recompute):
    """No cycle keeps blocks and activations alive until the garbage collector comes."""
    chunk = build(tiny_config("block", 4), recompute=recompute)
    output = chunk(random_batch(), {}, None)
    alive = weakref.ref(output.blocks[1])
    gc.disable()
    try:
        del output
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_two_phase_equals_single_reads(block_size, recompute):
    both = [tiny_config("block", block_size, residual={"two_phase": on}) for on in (True, False)]
    (loss, grads), (other_loss, other) = (
        loss_and_gradients(config, recompute=recompute) for config in both
    )
    torch.testing.assert_close(loss, other_loss, rtol=1e-13, atol=0)
    assert_same_gradients(grads, other, rtol=1e-11)


def test_block_size_one_is_full():
    loss, grads = loss_and_gradients(tiny_config("block", 1))
    full_loss, full = loss_and_gradients(tiny_config("full", 6))
    assert torch.equal(loss, full_loss)
    assert_same_gradients(grads, full, rtol=0)


def test_recomputation_keeps_less():
    def saved_bytes(recompute: str) -> int:
        chunk = build(tiny_config(), recompute=recompute)
        sizes: dict[int, int] = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            chunk(random_batch(length=64), {}, None)
        parameters = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
        return sum(size for pointer, size in sizes.items() if pointer not in parameters)

    assert saved_bytes("full") < 0.5 * saved_bytes("selective")
    assert saved_bytes("selective") < 0.9 * saved_bytes("none")


def test_first_sublayer_reads_the_embedding_bit_for_bit():
    chunk = build(tiny_config())
    seen = []
    first = chunk.layers["0"]
    first.input_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batch = random_batch()
    output = chunk(batch, {}, None)
    assert torch.equal(seen[0], chunk.embed_tokens.weight[batch.tokens])
    assert torch.equal(output.blocks[0], seen[0])
    output.loss.backward()
    assert first.self_attention_res_proj.weight.grad is None
    assert first.self_attention_res_norm.weight.grad is None
    assert first.mlp_res_proj.weight.grad.count_nonzero() > 0


def test_every_other_parameter_gets_a_gradient():
    chunk = build(tiny_config())
    chunk(random_batch(samples=4, length=32), {}, None).loss.backward()
    without = [name for name, p in chunk.named_parameters() if p.grad is None]
    assert without == [
        "layers.0.self_attention_res_proj.weight",
        "layers.0.self_attention_res_norm.weight",
    ]
    assert all(p.grad.isfinite().all() for p in chunk.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", ["standard", "full", "block"])
def test_untrained_loss_is_that_of_guessing(kind):
    chunk = ModelChunk(tiny_config(kind, initializer_range=0.02), 0, 5)
    init_weights(chunk, seed=3)
    loss = chunk(random_batch(samples=8, length=64), {}, None).loss
    assert abs(loss.item() - math.log(VOCABULARY)) < 0.02


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_tokens_are_counted_once_and_in_training_only(recompute):
    chunk = build(tiny_config(), recompute=recompute)
    batch = random_batch(samples=2, length=20)
    chunk(batch, {}, None).loss.backward()
    loads = router_loads(chunk)
    assert [load.sum().item() for load in loads] == [2 * 20 * 2] * 4  # samples, tokens, top-2
    chunk(batch, {}, None).loss.backward()
    assert [load.sum().item() for load in loads] == [2 * 2 * 20 * 2] * 4
    with torch.no_grad():
        chunk(batch, {}, None)
    chunk.eval()
    chunk(batch, {}, None)
    assert [load.sum().item() for load in loads] == [2 * 2 * 20 * 2] * 4


def test_logits_give_the_loss():
    config = tiny_config()
    chunks = build_split(config, [0, 3, 5], dtype=torch.float64)
    batch = random_batch()
    middle = chunks[0](batch, {}, None)
    loss = chunks[1](batch, middle.blocks, middle.partial).loss
    logits = chunks[1].logits(batch, middle.blocks, middle.partial)
    assert logits.shape == (2, 20, VOCABULARY)
    each = -logits.log_softmax(-1).gather(-1, batch.labels[..., None])[..., 0]
    expected = (each * batch.loss_mask).sum() / batch.loss_mask.double().sum()
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match="last layer"):
        chunks[0].logits(batch, {}, None)


def test_wrong_blocks_are_refused():
    chunk = build(tiny_config("block", 2), 2, 4)
    blocks = {i: torch.zeros(2, 20, 16) for i in (0, 2)}
    with pytest.raises(ValueError, match=r"reads blocks 0..2, but was given \[0, 2\]"):
        chunk(random_batch(), blocks, None)


def test_layers_outside_the_model_are_refused():
    with pytest.raises(ValueError, match="do not lie in a model of 5"):
        ModelChunk(tiny_config(), 3, 6)


def test_packed_documents_equal_separate_ones():
    """Three documents in one sample, through KDA, convolution, MLA, experts and two chunks."""
    chunks = build_split(tiny_config("block", 3), [0, 2, 5], dtype=torch.float64)
    batch = random_batch(samples=1, length=40)
    batch.cu_seqlens = torch.tensor([0, 7, 23, 40], dtype=torch.int32)
    packed = run_split(chunks, batch).loss * batch.loss_mask.double().sum()
    separate = 0
    for start, end in ((0, 7), (7, 23), (23, 40)):
        part = type(batch)(*(x[:, start:end] for x in list(vars(batch).values())[:3]))
        separate += run_split(chunks, part).loss * part.loss_mask.double().sum()
    torch.testing.assert_close(packed, separate, rtol=1e-12, atol=0)


def test_packed_documents_of_two_samples():
    chunk = build(tiny_config("block", 3), dtype=torch.float64)
    batch = random_batch(samples=2, length=10)
    expected = chunk.logits(batch, {}, None)
    batch.cu_seqlens = torch.tensor([0, 10, 20], dtype=torch.int32)
    torch.testing.assert_close(chunk.logits(batch, {}, None), expected, rtol=1e-11, atol=1e-12)


def test_repeats_bit_for_bit():
    def run():
        chunk = build(tiny_config())
        loss = chunk(random_batch(), {}, None).loss
        loss.backward()
        return loss, gradients([chunk])

    (loss, grads), (again, more) = run(), run()
    assert torch.equal(loss, again)
    assert_same_gradients(grads, more, rtol=0)
