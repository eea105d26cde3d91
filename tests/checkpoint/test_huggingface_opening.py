"""What lies beside exported weights; that transformers opens it is tried in tests/nightly."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from attnres_train.__main__ import main
from attnres_train.checkpoint import exported
from attnres_train.checkpoint.huggingface_config import check_same_model, released_config
from attnres_train.checkpoint.huggingface_opening import (
    MODELLING,
    has_code,
    opening_config,
    opens_natively,
    read_otherwise,
)
from attnres_train.config.model_schema import ModelConfig
from attnres_train.errors import UserError
from attnres_train.model.residual.kind import residual_kind
from tests.checkpoint.released import RUN
from tests.evaluation.models import imported

BLOCK = {"residual": {"kind": "block", "block_size": 4, "norm_eps": 1e-4}}
BOUNDED = {"kda": RUN["model"]["kda"] | {"gate": "lower_bound", "gate_lower_bound": -4.0}}
SAME_EPS = {"mla": RUN["model"]["mla"] | {"kv_norm_eps": 1e-6}}


def described(**changes) -> tuple[ModelConfig, dict, dict]:
    model = ModelConfig(**RUN["model"] | changes)
    residual = residual_kind(model).released()
    return model, residual, released_config(model, 32, residual)


@pytest.mark.parametrize("changes", [{}, BLOCK, BOUNDED, BLOCK | BOUNDED, SAME_EPS])
def test_what_config_json_says_and_who_opens_it(tmp_path, changes):
    model, residual, description = described(**changes)
    config = opening_config(description, residual, model, eod=7)
    native = not ("residual" in changes or "kda" in changes)
    assert opens_natively(description, residual) == native
    assert config["model_type"] == ("kimi_linear" if native else "kimi_linear_attnres")
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == (
        7,
        None,
        None,
    )
    assert config["kv_norm_eps"] == model.mla.kv_norm_eps
    assert config.get("attn_res_norm_eps") == (1e-4 if "residual" in changes else None)
    # A name in auto_map is a class of the file.
    file = Path(exported.__file__).with_name(MODELLING)
    names = {one.name for one in ast.parse(file.read_text()).body if isinstance(one, ast.ClassDef)}
    assert {name.split(".")[1] for name in config["auto_map"].values()} <= names
    told = read_otherwise(description, residual, model)
    assert bool(told) == (native and changes is not SAME_EPS)
    # An import reads it, and compares what was added.
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_same_model(tmp_path, model)
    model.mla.kv_norm_eps = 0.5
    with pytest.raises(UserError, match=r"but model\.mla\.kv_norm_eps is 0\.5"):
        check_same_model(tmp_path, model)


def test_a_residual_of_the_users_own_has_no_code():
    model, _, description = described()
    config = opening_config(description, {"layer_scale": True}, model, None)
    assert not has_code({"layer_scale": True})
    assert "auto_map" not in config and config["model_type"] == "kimi_linear"
    (told,) = read_otherwise(description, {"layer_scale": True}, model)
    assert "no modelling code" in told


def test_an_exported_folder_holds_its_tokenizer(tmp_path, capsys):
    run, folder = imported(tmp_path), tmp_path / "exported"
    assert main(["export", str(run), str(folder)]) == 0
    assert "no tokenizer files" not in capsys.readouterr().out
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    found = json.loads((folder / "tokenizer_config.json").read_text())
    assert found["eos_token"] == "<|endoftext|>" and found["model_max_length"] == 32
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 0, "pad_token_id": 0}
    assert (folder / MODELLING).is_file()
    (tmp_path / "tokenizer.json").unlink()
    assert main(["export", str(run), str(tmp_path / "without")]) == 0
    assert "note: no tokenizer files: " in capsys.readouterr().out
    assert json.loads((tmp_path / "without/config.json").read_text())["eos_token_id"] is None
