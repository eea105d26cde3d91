"""What makes a folder of exported weights open by itself: token ids in its ``config.json``, a
``generation_config.json``, and modelling code for what transformers has no class of its own for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnres_train.config.model_schema import ModelConfig

MODELLING = "modeling_attnres.py"
"""Read by transformers with ``trust_remote_code``."""
ATTNRES_TYPE = "kimi_linear_attnres"
_NATIVE_KV_NORM_EPS = 1e-6  # the released modelling code, and transformers' own


def has_code(residual: Mapping[str, Any]) -> bool:
    """Whether the modelling code computes the residual that has the keys ``residual``
    (`ResidualKind.released`): one running sum, or Attention Residuals; none of the user's own."""
    return set(residual) <= {"attn_res_block_size"}


def opens_natively(description: Mapping[str, Any], residual: Mapping[str, Any]) -> bool:
    """Whether transformers' own `kimi_linear` computes the model that ``description``, a
    `released_config`, describes: one running sum, and a gate without a lower bound."""
    return not residual and "gate_lower_bound" not in description["linear_attn_config"]


def opening_config(
    description: Mapping[str, Any], residual: Mapping[str, Any], model: ModelConfig, eod: int | None
) -> dict[str, Any]:
    """The content of ``config.json`` by which ``description`` (a `released_config` of ``model``
    with the keys ``residual``) opens; ``eod`` is the id that ends a document.

    What no class of transformers' own computes has a ``model_type`` of its own: opened without the
    modelling code it is refused, and not taken for a model without Attention Residuals.
    """
    more: dict[str, Any] = {
        # Absent, those of Kimi-Linear's vocabulary would be assumed.
        "bos_token_id": None,
        "eos_token_id": eod,
        "pad_token_id": None,
        "kv_norm_eps": model.mla.kv_norm_eps,
    }
    if has_code(residual):
        code = MODELLING.removesuffix(".py")
        more["auto_map"] = {
            "AutoConfig": f"{code}.AttnResConfig",
            "AutoModel": f"{code}.AttnResModel",
            "AutoModelForCausalLM": f"{code}.AttnResForCausalLM",
        }
        if not opens_natively(description, residual):
            more |= {"model_type": ATTNRES_TYPE, "architectures": ["AttnResForCausalLM"]}
    if "attn_res_block_size" in residual:
        more["attn_res_norm_eps"] = model.residual.norm_eps
    return dict(sorted((dict(description) | more).items()))


def write_opening(folder: Path, residual: Mapping[str, Any], eod: int | None) -> None:
    """The modelling code, and ``generation_config.json``."""
    if has_code(residual):
        shutil.copyfile(Path(__file__).parent / "exported" / MODELLING, folder / MODELLING)
    generation = {} if eod is None else {"eos_token_id": eod, "pad_token_id": eod}
    text = json.dumps(generation, indent=2) + "\n"
    (folder / "generation_config.json").write_text(text, encoding="utf-8")


def read_otherwise(
    description: Mapping[str, Any], residual: Mapping[str, Any], model: ModelConfig
) -> list[str]:
    """Notes on what transformers' own class takes otherwise than ``config.json`` says, and on what
    no code is written for."""
    if not has_code(residual):
        return [f"no modelling code: it knows nothing of model.residual.kind {model.residual.kind}"]
    eps = model.mla.kv_norm_eps
    if not opens_natively(description, residual) or eps == _NATIVE_KV_NORM_EPS:
        return []
    return [
        f"model.mla.kv_norm_eps is {eps:g}, as {MODELLING} has it (trust_remote_code=True); "
        f"transformers' own class takes {_NATIVE_KV_NORM_EPS:g} always, logits differ a little"
    ]
