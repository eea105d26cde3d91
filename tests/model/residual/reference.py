"""Every residual in fp64 from its formula, one token at a time where that is clearest.

`final_state` runs a chunk's own sublayers (attention and MLP) but nothing of its residual: what a
sublayer reads, and the norm on it, are computed here, from the chunk's parameters by name.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import torch
from torch import Tensor, nn

from attnres_train.config.model_schema import ResidualConfig
from attnres_train.model.chunk import ModelChunk

Sublayer = Callable[[Tensor], Tensor]


def final_state(chunk: ModelChunk, embedding: Tensor) -> Tensor:
    """What the output head of a whole model reads, [B, T, D], before the final norm."""
    options = chunk.config.residual
    kinds = {"standard": _standard, "dense_former": _dense_former, "mhc_lite": _mhc_lite}
    run = kinds.get(options.kind, _attention_residuals)
    parameters = dict(chunk.named_parameters())
    return run(options, chunk.config.block_size, sublayers(chunk), parameters, embedding)


def sublayers(chunk: ModelChunk) -> list[tuple[str, Sublayer]]:
    """Prefix of the names of each read, and the sublayer after it."""
    found: list[tuple[str, Sublayer]] = []
    for index, layer in chunk.layers.items():

        def attention(x: Tensor, layer=layer) -> Tensor:
            return layer.self_attn(normed(layer.input_layernorm, x), None)

        def mlp(x: Tensor, layer=layer) -> Tensor:
            x = normed(layer.post_attention_layernorm, x)
            return layer.mlp(x) if hasattr(layer, "mlp") else layer.block_sparse_moe(x)[0]

        found.append((f"layers.{index}.self_attention_res", attention))
        found.append((f"layers.{index}.mlp_res", mlp))
    return found


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm with the weights of ``norm``, and its gate if it has one."""
    y = norm.weight * _unit(x, norm.eps)
    if hasattr(norm, "gate_down"):
        low = y @ norm.gate_down.T
        y = y / (1 + (-(low / (1 + (-low).exp()) @ norm.gate_up.T)).exp())
    return y


def _unit(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def _standard(options, block_size, sublayers, parameters, embedding) -> Tensor:
    x = embedding
    for _, f in sublayers:
        x = x + f(x)
    return x


def _attention_residuals(options, block_size, sublayers, parameters, embedding) -> Tensor:
    blocks, outputs = [embedding], []
    for number, (prefix, f) in enumerate(sublayers, 1):
        partial = [sum(outputs)] if outputs else []
        outputs.append(f(attend(options, parameters, prefix, [*blocks, *partial])))
        if number % block_size == 0 or number == len(sublayers):
            units = options.block_sum == "unit_outputs"
            blocks.append(sum(_unit(y, options.norm_eps) if units else y for y in outputs))
            outputs = []
    return attend(options, parameters, "output_attn_res", blocks)


def attend(
    options: ResidualConfig, parameters: dict[str, Tensor], prefix: str, sources: list[Tensor]
) -> Tensor:
    """``h = sum_i a_i v_i``, head by head."""
    if options.window is not None:
        recent = range(max(1, len(sources) - options.window), len(sources))
        sources = [sources[0], *(sources[i] for i in recent)]
    dim = sources[0].shape[-1]
    size = dim // options.num_heads
    unit = [_unit(v, options.norm_eps) for v in sources]
    if options.scores == "key":
        keys = sources
        if options.key_norm:
            keys = [u * parameters[f"{prefix}_norm.weight"] for u in unit]
        if options.query == "input":
            query = unit[-1] @ parameters[f"{prefix}_query.weight"].T
        else:
            query = parameters[f"{prefix}_proj.weight"][0].expand_as(unit[-1])
    heads = []
    for head in range(options.num_heads):
        part = slice(head * size, (head + 1) * size)
        if options.scores == "bias":
            learned = parameters[f"{prefix}_scores"][:, head]
            assert len(learned) == len(sources)
            scores = [s.expand(sources[0].shape[:-1]) for s in learned]
        else:
            scores = [(query[..., part] * key[..., part]).sum(-1) for key in keys]
        if options.normalizer == "sigmoid":
            weights = [1 / (1 + (-s).exp()) for s in scores]
        else:
            total = sum(s.exp() for s in scores)
            weights = [s.exp() / total for s in scores]
        values = keys if options.values == "key" else sources
        pairs = zip(weights, values, strict=True)
        heads.append(sum(w[..., None] * v[..., part] for w, v in pairs))
    return torch.cat(heads, -1)


def _dense_former(options, block_size, sublayers, parameters, embedding) -> Tensor:
    states, y = [embedding], embedding
    for (prefix, attention), (_, mlp) in zip(sublayers[::2], sublayers[1::2], strict=True):
        if len(states) > 1:
            y = _average(parameters[f"{prefix}_weights"], states)
        x = y + attention(y)
        states.append(x + mlp(x))
    return _average(parameters["output_attn_res_weights"], states)


def _average(weights: Tensor, states: list[Tensor]) -> Tensor:
    return sum(w * x for w, x in zip(weights, states, strict=True))


def _mhc_lite(options, block_size, sublayers, parameters, embedding) -> Tensor:
    count = options.num_streams
    streams = [embedding] * count
    for prefix, f in sublayers:
        together = torch.cat(streams, -1)
        together = together / (together.square().mean(-1, keepdim=True) + options.norm_eps).sqrt()
        product = together @ parameters[f"{prefix}_gates.weight"].T
        bias, scales = parameters[f"{prefix}_gates.bias"], parameters[f"{prefix}_gate_scales"]
        pre = torch.sigmoid(scales[0] * product[..., :count] + bias[:count])
        post = product[..., count : 2 * count]
        post = 2 * torch.sigmoid(scales[1] * post + bias[count : 2 * count])
        shares = (scales[2] * product[..., 2 * count :] + bias[2 * count :]).softmax(-1)
        output = f(sum(pre[..., i, None] * streams[i] for i in range(count)))
        mixed = [post[..., i, None] * output for i in range(count)]
        for k, order in enumerate(permutations(range(count))):
            for i, j in enumerate(order):
                mixed[i] = mixed[i] + shares[..., k, None] * streams[j]
        streams = mixed
    return sum(streams)
