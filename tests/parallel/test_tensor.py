"""Layers, embedding and loss whose tensors are split, against the same ones in one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from attnres_train.config.model_schema import KDAConfig, MLAConfig
from attnres_train.model.head import linear_cross_entropy
from attnres_train.model.kda.layer import KimiDeltaAttention
from attnres_train.model.mla import MultiHeadLatentAttention
from attnres_train.model.mlp import SwiGLU
from attnres_train.model.parameters import ParameterRule
from attnres_train.model.split import TensorSplit, Whole
from attnres_train.parallel.tensor import GroupSplit, tensor_split

HIDDEN, SAMPLES, TOKENS, ENTRIES = 12, 2, 8, 20
KDA = KDAConfig(num_heads=4, head_dim=4, chunk_size=4)
MLA = MLAConfig(num_heads=4, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3)
LAYERS: dict[str, Callable[[TensorSplit], nn.Module]] = {
    "mlp": lambda split: SwiGLU(HIDDEN, 16, split),
    "kda": lambda split: KimiDeltaAttention(HIDDEN, KDA, 1e-5, split),
    "mla": lambda split: MultiHeadLatentAttention(HIDDEN, MLA, split),
}
Found = dict[str, Tensor]


def random(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def rules_of(layer: nn.Module) -> dict[str, ParameterRule]:
    """Of all that is learnt in ``layer``."""
    return {
        f"{place}.{name}".removeprefix("."): rule
        for place, part in layer.named_modules()
        if hasattr(part, "parameter_rules")
        for name, rule in part.parameter_rules(0.02).items()
    }


def layer_on(split: TensorSplit, name: str) -> Found:
    """Output, and gradients by parameter, for the tokens here; what is split is put together and
    what is not summed up."""
    layer, rules = LAYERS[name](split).double(), rules_of(LAYERS[name](split))
    for index, (key, parameter) in enumerate(layer.named_parameters()):
        whole = random(*split.whole(parameter.shape, rules[key].split), seed=index) / 2
        parameter.data.copy_(split.mine(whole, rules[key].split))
    x = split.mine(random(SAMPLES, TOKENS, HIDDEN), 1).clone().requires_grad_()
    borders = torch.tensor([0, 3, 8, 13, 16], dtype=torch.int32)
    y = layer(x) if name == "mlp" else layer(x, borders)
    (y * split.mine(random(SAMPLES, TOKENS, HIDDEN, seed=9), 1)).sum().backward()
    found = {"y": whole_of(split, y.detach(), 1), "x": whole_of(split, x.grad, 1)}
    for key, parameter in layer.named_parameters():
        found[key] = whole_of(split, parameter.grad, rules[key].split)
    return found


def whole_of(split: TensorSplit, tensor: Tensor, axis: int | None) -> Tensor:
    if isinstance(split, Whole):
        return tensor
    if axis is None:
        total = tensor.clone()
        dist.all_reduce(total)
        return total
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, axis)


def on_a_rank(function: Callable[..., Found], *args: object) -> Found:
    return function(tensor_split(dist.group.WORLD), *args)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_equals_one_process(pool, name, ranks):
    expected = layer_on(Whole(), name)
    for found in pool.run(partial(on_a_rank, layer_on), ranks, name):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12, msg=key)


def loss_on(split: TensorSplit, dtype: torch.dtype, autocast: bool) -> Found:
    """Embedding, head and loss over some tokens at a time, with gradients; then all logits."""
    vocabulary = split.vocabulary(ENTRIES)
    embedding, head = vocabulary.embedding(HIDDEN), split.column(HIDDEN, ENTRIES)
    tables = [(embedding.weight, 3), (head.weight, 4)]
    for weight, seed in tables:
        weight.data = split.mine(random(ENTRIES, HIDDEN, seed=seed), 0).to(dtype)
    generator = torch.Generator().manual_seed(5)
    tokens, labels = torch.randint(ENTRIES, (2, SAMPLES, TOKENS), generator=generator)
    mask = torch.rand(SAMPLES * TOKENS, generator=generator).round(decimals=1).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x = split.gather(embedding(tokens)).flatten(0, 1)
        loss = linear_cross_entropy(
            x, head.weight, labels.flatten(), mask, 3 * ENTRIES, vocabulary=vocabulary
        )
        loss.backward()
        logits = vocabulary.join(head(split.gather(embedding(tokens))))
    gradients = {
        name: whole_of(split, w.grad, 0) for (w, _), name in zip(tables, "eh", strict=True)
    }
    for weight, _ in tables:
        weight.grad = None
    (logits * random(*logits.shape, seed=6)).sum().backward()
    of_logits = {n: whole_of(split, w.grad, 0) for (w, _), n in zip(tables, "EH", strict=True)}
    return {"loss": loss.detach(), "logits": logits.detach(), **gradients, **of_logits}


@pytest.mark.parametrize(
    ("dtype", "autocast", "relative"),
    [
        (torch.float64, False, 1e-13),
        (torch.float32, False, 2e-6),  # sums over ranks in another order
        (torch.float32, True, 2e-2),  # parts of sums are rounded to bf16 before they are added
    ],
    ids=["fp64", "fp32", "bf16"],
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_loss_equals_one_process(pool, ranks, dtype, autocast, relative):
    expected = loss_on(Whole(), dtype, autocast)
    results = pool.run(partial(on_a_rank, loss_on), ranks, dtype, autocast)
    for found in results:
        assert torch.equal(found["loss"], results[0]["loss"])
        for key, value in expected.items():
            error = (found[key] - value).norm() / value.norm()
            assert error <= relative, f"{key}: {error:.2e}"
    assert expected["loss"].dtype == results[0]["loss"].dtype


def refusal() -> str:
    with pytest.raises(ValueError, match="5 cannot be shared by 2 ranks") as caught:
        GroupSplit(dist.group.WORLD).share(5)
    return str(caught.value)


def test_what_cannot_be_shared(pool):
    assert len(set(pool.run(refusal, 2))) == 1
