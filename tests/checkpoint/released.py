"""A tiny checkpoint as Kimi-Linear is released, made by hand, and the YAML file of a run for it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from tests.data.tiny import write_text

CONFIG = {
    "architectures": ["KimiLinearForCausalLM"],
    "model_type": "kimi_linear",
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 5,
    "intermediate_size": 24,
    "rms_norm_eps": 1e-5,
    "linear_attn_config": {
        "full_attn_layers": [3, 5],
        "kda_layers": [1, 2, 4],
        "num_heads": 3,
        "head_dim": 8,
        "short_conv_kernel_size": 4,
    },
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "mla_use_nope": True,
    "first_k_dense_replace": 1,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 12,
    "routed_scaling_factor": 1.7,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "tie_word_embeddings": False,
}
RUN = {
    "model": {
        "hidden_size": 16,
        "num_layers": 5,
        "vocab_size": 300,
        "intermediate_size": 24,
        "full_attention_layers": [3, 5],
        "residual": {"kind": "standard"},
        "kda": {"num_heads": 3, "head_dim": 8, "chunk_size": 16},
        "mla": {
            "num_heads": 2,
            "kv_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 6,
        },
        "moe": {
            "num_experts": 4,
            "num_experts_per_token": 2,
            "intermediate_size": 12,
            "routed_scaling_factor": 1.7,
            "bias_update_rate": 0.0,
        },
    },
    "train": {"train_iters": 1, "seq_length": 32, "global_batch_size": 2, "device": "cpu"},
    "data": {"tokenizer": {"kind": "bpe", "vocab_size": 300}, "split": [0.8, 0.2]},
}


def tensors(layers_per_block: int | None, seed: int = 0) -> dict[str, Tensor]:
    """Random values for every released name of `CONFIG`: bf16, the decay of KDA fp32."""
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in _shapes(layers_per_block):
        value = torch.randn(shape, generator=rng)
        if name.endswith("norm.weight"):
            value = 1 + value / 10
        elif name.endswith("A_log"):
            value = value.abs()
        elif "_res_proj" not in name and "conv1d" not in name:
            value = value * 0.3
        is_decay = name.endswith(("A_log", "dt_bias"))
        found[name] = value if is_decay else value.bfloat16()
    return found


def _shapes(layers_per_block: int | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    top = {"embed_tokens": (300, 16), "norm": (16,)}
    if layers_per_block:
        top |= {"output_attn_res_proj": (1, 16), "output_attn_res_norm": (16,)}
    yield from ((f"model.{name}.weight", shape) for name, shape in top.items())
    yield "lm_head.weight", (300, 16)
    for i in range(5):
        layer = {"input_layernorm.weight": (16,), "post_attention_layernorm.weight": (16,)}
        if layers_per_block:
            for side in ("self_attention", "mlp"):
                layer |= {f"{side}_res_proj.weight": (1, 16), f"{side}_res_norm.weight": (16,)}
        attention = _mla_shapes() if i in (2, 4) else _kda_shapes()
        layer |= {f"self_attn.{name}": shape for name, shape in attention.items()}
        layer |= _swiglu_shapes("mlp.", 24) if i == 0 else _moe_shapes()
        yield from ((f"model.layers.{i}.{name}", shape) for name, shape in layer.items())


def _kda_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {f"{n}_proj.weight": (24, 16) for n in "qkv"}
    shapes |= {f"{n}_conv1d.weight": (24, 1, 4) for n in "qkv"}
    for n in "fg":
        shapes |= {f"{n}_a_proj.weight": (8, 16), f"{n}_b_proj.weight": (24, 8)}
    shapes |= {"A_log": (1, 1, 3, 1), "dt_bias": (24,), "b_proj.weight": (3, 16)}
    return shapes | {"o_norm.weight": (8,), "o_proj.weight": (16, 24)}


def _mla_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {"q_proj.weight": (24, 16), "kv_a_proj_with_mqa.weight": (12, 16)}
    shapes |= {"kv_a_layernorm.weight": (8,), "kv_b_proj.weight": (28, 8)}
    return shapes | {"o_proj.weight": (16, 12)}


def _swiglu_shapes(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    shapes = {f"{prefix}{n}_proj.weight": (width, 16) for n in ("gate", "up")}
    return shapes | {f"{prefix}down_proj.weight": (16, width)}


def _moe_shapes() -> dict[str, tuple[int, ...]]:
    prefix = "block_sparse_moe."
    shapes = {f"{prefix}gate.weight": (4, 16), f"{prefix}gate.e_score_correction_bias": (4,)}
    for e in range(4):
        shapes |= {f"{prefix}experts.{e}.{n}.weight": (12, 16) for n in ("w1", "w3")}
        shapes |= {f"{prefix}experts.{e}.w2.weight": (16, 12)}
    return shapes | _swiglu_shapes(f"{prefix}shared_experts.", 12)


def write_released(folder: Path, values: dict[str, Tensor], **config: Any) -> Path:
    """``folder`` with ``values`` dealt out to three files; ``config`` changes `CONFIG`."""
    folder.mkdir(parents=True)
    files = {f"model-{n + 1:05d}-of-00003.safetensors": list(values)[n::3] for n in range(3)}
    for file, names in files.items():
        save_file({name: values[name] for name in names}, folder / file)
    index = {"weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return folder


def write_run(folder: Path, **changes: Any) -> Path:
    """The YAML file of run ``r`` in ``folder``, beside its corpus. ``changes`` replace sections of
    `RUN`, those of ``model`` single keys."""
    run = copy.deepcopy(RUN)
    run["model"] |= changes.pop("model", {})
    run |= {"run": {"name": "r", "dir": str(folder)}, **changes}
    run["data"]["corpus"] = [{"kind": "text", "path": str(write_text(folder / "corpus", 16, 40))}]
    run["data"]["cache_dir"] = str(folder / "cache")
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path
