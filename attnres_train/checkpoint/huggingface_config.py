"""The released ``config.json`` (moonshotai/Kimi-Linear-48B-A3B; Attention Residuals by the key of
Kimi-K3) and the model section of a run's configuration, one against the other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from attnres_train.config.model_schema import ModelConfig
from attnres_train.errors import UserError

CONFIG = "config.json"

# Keys whose values shape the model: released name -> ours below `model`.
_SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "intermediate_size": "intermediate_size",
    "rms_norm_eps": "norm_eps",
    "linear_attn_config.num_heads": "kda.num_heads",
    "linear_attn_config.head_dim": "kda.head_dim",
    "linear_attn_config.short_conv_kernel_size": "kda.short_conv_kernel_size",
    "num_attention_heads": "mla.num_heads",
    "num_key_value_heads": "mla.num_heads",
    "kv_lora_rank": "mla.kv_lora_rank",
    "qk_nope_head_dim": "mla.qk_nope_head_dim",
    "qk_rope_head_dim": "mla.qk_rope_head_dim",
    "v_head_dim": "mla.v_head_dim",
    "first_k_dense_replace": "moe.first_dense_layers",
    "num_experts": "moe.num_experts",
    "num_experts_per_token": "moe.num_experts_per_token",
    "num_shared_experts": "moe.num_shared_experts",
    "moe_intermediate_size": "moe.intermediate_size",
    "routed_scaling_factor": "moe.routed_scaling_factor",
}
# Keys that have one value in every model there is here.
_FIXED = {
    "hidden_act": "silu",
    "q_lora_rank": None,
    "mla_use_nope": True,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_expert_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
}
# Keys that are written for other programs and mean nothing to the model.
_UNUSED = {
    "architectures": ["KimiLinearForCausalLM"],
    "dtype": "bfloat16",
    "model_type": "kimi_linear",
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "use_cache": True,
    "use_grouped_topk": True,
}
# Keys that `huggingface_opening` adds.
_OWN = {"kv_norm_eps": "mla.kv_norm_eps", "attn_res_norm_eps": "residual.norm_eps"}
_MODEL_TYPES = ("kimi_linear", "kimi_linear_attnres")
# Keys of Kimi-K3; absent means no blocks, and the gate without a bound.
_BLOCK_SIZE = "attn_res_block_size"
_LOWER_BOUND = "gate_lower_bound"


def released_config(
    model: ModelConfig, context_length: int, residual: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of ``config.json`` for ``model``, trained on ``context_length`` tokens.

    Layers count from 1. ``residual`` are the keys that say the residual, of its kind
    (`ResidualKind.released`); ``gate_lower_bound`` is there where the gate of KDA has one.
    """
    same = {theirs: _ours(model, ours) for theirs, ours in _SAME.items()}
    linear = {k.partition(".")[2]: value for k, value in same.items() if "." in k}
    config = _UNUSED | _FIXED | {k: value for k, value in same.items() if "." not in k}
    config["linear_attn_config"] = linear | _layers(model)
    if model.kda.lower_bound is not None:
        config["linear_attn_config"][_LOWER_BOUND] = model.kda.lower_bound
    config["head_dim"] = model.hidden_size // model.mla.num_heads
    config["initializer_range"] = model.initializer_range
    config["model_max_length"] = context_length
    return dict(sorted((config | dict(residual)).items()))


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def left_unsaid(model: ModelConfig, residual: Iterable[str]) -> list[str]:
    """Values of ``model`` that have no key in a released ``config.json`` and are not what readers
    assume; of its residual those that the kind says (`ResidualKind.unsaid`)."""
    notes = list(residual)
    if model.mla.kv_norm_eps != model.norm_eps:
        notes.insert(0, f"model.mla.kv_norm_eps is {model.mla.kv_norm_eps:g}")
    return [
        f"{note}, for which other programs than the modelling code beside it may take the "
        f"rms_norm_eps of {CONFIG}, {model.norm_eps:g}"
        for note in notes
    ]


def check_same_model(folder: Path, model: ModelConfig) -> None:
    """Raise UserError with every key of ``folder``'s config.json that describes another model.

    Keys that are absent there are not compared, nor is the block size where it has none.
    """
    file = folder / CONFIG
    try:
        theirs = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error})") from error
    problems = [f"\n  {problem}" for problem in _differences(theirs, model)]
    if problems:
        raise UserError(f"{file} describes another model than the config:" + "".join(problems))


def _differences(theirs: dict[str, Any], model: ModelConfig) -> Iterator[str]:
    linear = theirs.get("linear_attn_config") or {}
    found = theirs | {f"linear_attn_config.{key}": value for key, value in linear.items()}
    if (found_type := found.get("model_type", _MODEL_TYPES[0])) not in _MODEL_TYPES:
        yield f"model_type is {json.dumps(found_type)}, but here it is always " + " or ".join(
            map(json.dumps, _MODEL_TYPES)
        )
    for key, value in _FIXED.items():
        if found.get(key, value) != value:
            yield f"{key} is {json.dumps(found[key])}, but here it is always {json.dumps(value)}"
    for key, ours in (_SAME | _OWN).items():
        if found.get(key, _ours(model, ours)) != _ours(model, ours):
            yield f"{key} is {found[key]}, but model.{ours} is {_ours(model, ours)}"
    for key, layers in _layers(model).items():
        if sorted(linear.get(key, layers)) != layers:
            yield f"linear_attn_config.{key} is {linear[key]}, but the config makes it {layers}"
    if linear and linear.get(_LOWER_BOUND) != model.kda.lower_bound:
        yield (
            f"linear_attn_config.{_LOWER_BOUND} is {json.dumps(linear.get(_LOWER_BOUND))}, but "
            f"model.kda.gate is {model.kda.gate} ({json.dumps(model.kda.lower_bound)})"
        )
    layers_per_block = found.get(_BLOCK_SIZE)
    if layers_per_block is not None and 2 * layers_per_block != model.block_size:
        sublayers = model.block_size or f"none: model.residual.kind is {model.residual.kind}"
        yield (
            f"{_BLOCK_SIZE} is {layers_per_block} decoder layers, that is "
            f"model.residual.block_size {2 * layers_per_block}, but the config's is {sublayers}"
        )


def _ours(model: ModelConfig, path: str) -> Any:
    return reduce(getattr, path.split("."), model)


def _layers(model: ModelConfig) -> dict[str, list[int]]:
    full = [i + 1 for i in range(model.num_layers) if model.is_full_attention(i)]
    kda = [i + 1 for i in range(model.num_layers) if not model.is_full_attention(i)]
    return {"full_attn_layers": full, "kda_layers": kda}
