"""Parameters in fp32, bf16 and fp64, autocast, and a residual stream of another dtype."""

from __future__ import annotations

import pytest
import torch

from tests.model.tiny import build, build_split, random_batch, tiny_config

FP32 = torch.float32
KEPT = ("A_log", "dt_bias")


@pytest.fixture(scope="module")
def exact() -> float:
    return build(tiny_config(), dtype=torch.float64)(random_batch(), {}, None).loss.item()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-5), (torch.bfloat16, 0.1)]
)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_parameter_dtype(dtype, tolerance, recompute, exact):
    chunk = build(tiny_config(), dtype=dtype, recompute=recompute)
    wide = torch.promote_types(dtype, FP32)
    for name, parameter in chunk.named_parameters():
        assert parameter.dtype == (wide if name.endswith(KEPT) else dtype), name
    assert chunk.layers["1"].block_sparse_moe.gate.e_score_correction_bias.dtype == FP32
    output = chunk(random_batch(), {}, None)
    assert {block.dtype for block in output.blocks.values()} == {dtype}
    assert output.loss.dtype == wide
    assert abs(output.loss.item() - exact) <= tolerance
    output.loss.backward()
    for name, parameter in chunk.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.dtype == wide
            assert parameter.grad.isfinite().all(), name


def test_gradients_of_bf16_parameters_add_up_in_fp32():
    """In bf16 a sum stops growing once it is 256 times what is added."""
    weight = build(tiny_config(), dtype=torch.bfloat16).norm.weight
    for _ in range(1000):
        (0.01 * weight).sum().backward()
    torch.testing.assert_close(weight.grad, torch.full_like(weight.grad, 10), rtol=2e-3, atol=0)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("stream_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["standard", "block"])
def test_autocast(kind, stream_dtype, recompute):
    options = {"stream_dtype": stream_dtype, "autocast_dtype": torch.bfloat16}
    exact = build(tiny_config(kind), dtype=torch.float64)(random_batch(), {}, None).loss.item()
    chunks = build_split(tiny_config(kind), [0, 2, 5], recompute=recompute, **options)
    seen = []
    chunks[0].layers["1"].self_attn.q_proj.register_forward_hook(lambda *x: seen.append(x[2].dtype))
    batch = random_batch()
    middle = chunks[0](batch, {}, None)
    output = chunks[1](batch, middle.blocks, middle.partial)
    assert chunks[1].logits(batch, middle.blocks, middle.partial).dtype == torch.bfloat16
    for tensor in (*middle.blocks.values(), middle.partial):
        if tensor is not None:
            assert tensor.dtype == (stream_dtype or FP32)
    assert output.loss.dtype == FP32
    assert abs(output.loss.item() - exact) < 0.1
    output.loss.backward()
    assert set(seen) == {torch.bfloat16}  # in recomputation too
    assert len(seen) == (2 if recompute == "full" else 1)
    assert chunks[0].embed_tokens.weight.grad.dtype == FP32
    assert chunks[1].layers["3"].block_sparse_moe.experts.w1.grad.dtype == FP32


@pytest.mark.parametrize("kind", ["standard", "block"])
def test_wide_stream_over_bf16_parameters(kind):
    chunk = build(tiny_config(kind), dtype=torch.bfloat16, stream_dtype=FP32)
    seen = []
    layer = chunk.layers["2"]
    for module in (layer.input_layernorm, layer.self_attn.q_proj):
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    output = chunk(random_batch(), {}, None)
    output.loss.backward()
    assert seen == [FP32, torch.bfloat16]
