"""`attnres-train import` and `export`, whole: a released checkpoint made by hand becomes a run, and
the run a released checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from attnres_train.__main__ import main
from attnres_train.checkpoint import store
from attnres_train.checkpoint.manifest import read_manifest
from attnres_train.checkpoint.verify import read_one
from attnres_train.config import load_config
from attnres_train.model.batch import MicroBatch
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.init import init_weights
from attnres_train.model.naming import released_tensors
from attnres_train.model.parameters import Learned, ParameterRule, normal
from attnres_train.model.parts import named, narrowed, whole
from tests.checkpoint import kimi_linear_reference as reference
from tests.checkpoint.released import CONFIG, tensors, write_released, write_run
from tests.checkpoint.toy import rewrite_meta
from tests.model.residual.layer_scale import LayerScale

BLOCK = {"residual": {"kind": "block", "block_size": 4}}
STEP_0 = "r/checkpoints/step_00000000"


def contents(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def error_of(capsys, *arguments: str | Path) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("layers_per_block", [None, 2])
@pytest.mark.parametrize("flat", [False, True], ids=["A_log_1_1_H_1", "A_log_H"])
def test_imported_weights_compute_what_was_published(tmp_path, layers_per_block, flat):
    values = tensors(layers_per_block)
    if flat:
        values = {n: t.flatten() if n.endswith("A_log") else t for n, t in values.items()}
    keys = {"attn_res_block_size": layers_per_block} if layers_per_block else {}
    source = write_released(tmp_path / "source", values, **keys)
    run = write_run(tmp_path, model=BLOCK if layers_per_block else {})
    assert main(["import", str(source), str(run)]) == 0

    model = load_config(run).model
    chunk = ModelChunk(model, 0, model.num_layers)
    found = dict(released_tensors(chunk.state_dict().items()))
    store.load(tmp_path / STEP_0, found, unread=("optimizer.",))
    chunk.double()
    tokens = torch.randint(300, (40,), generator=torch.Generator().manual_seed(1))
    batch = MicroBatch(tokens[None], tokens[None], torch.ones(1, 40))
    with torch.no_grad():
        ours = chunk.logits(batch, {}, None)[0]
    expected = reference.logits(values, CONFIG | keys, tokens)
    assert expected.std() > 0.3
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("precision", ["fp32", "bf16_params"])
def test_round_trip_is_bit_for_bit(tmp_path, capsys, precision):
    values = tensors(2)
    source = write_released(tmp_path / "source", values, attn_res_block_size=2)
    run = write_run(tmp_path, model=BLOCK)
    assert main(["import", str(source), str(run), f"train.precision={precision}"]) == 0
    assert main(["export", str(tmp_path / "r"), str(tmp_path / "again")]) == 0
    assert_same(contents(tmp_path / "again"), values)
    elements = sum(tensor.numel() for tensor in values.values())
    counted = f"{len(values):,} tensors, {elements:,} elements"
    assert capsys.readouterr().out.count(counted) == 2
    index = json.loads((tmp_path / "again/model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(sorted(values), "model-00001-of-00001.safetensors")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in values.values())
    config = json.loads((tmp_path / "again/config.json").read_text())
    # Nothing takes it for a model without blocks.
    own = {"model_type": "kimi_linear_attnres", "architectures": ["AttnResForCausalLM"]}
    assert (CONFIG | own).items() <= config.items()
    assert config["attn_res_block_size"] == 2


@pytest.mark.nightly
def test_training_resumes_from_imported_weights(tmp_path):
    """On two stages, with a learning rate that leaves bf16 weights as they are: the exported
    checkpoint is then the imported one, by way of masters and pipeline."""
    values = tensors(2)
    source = write_released(tmp_path / "source", values)
    changes = {
        "model": BLOCK,
        "parallel": {"pipeline_model_parallel_size": 2},
        "optimizer": {"lr": 1e-30},
    }
    run = [str(write_run(tmp_path, **changes)), "train.precision=bf16_params"]
    assert main(["import", str(source), *run]) == 0
    command = [sys.executable, "-m", "attnres_train", "train", *run]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert f"resumed from {tmp_path / STEP_0}" in result.stdout
    step_1 = tmp_path / "r/checkpoints/step_00000001"
    assert read_manifest(step_1).extras["progress"]["step"] == 1
    assert main(["export", str(step_1), str(tmp_path / "again")]) == 0
    assert_same(contents(tmp_path / "again"), values)


def test_blocks_on_top_of_a_checkpoint_without(tmp_path, capsys):
    values = tensors(None)
    source = write_released(tmp_path / "source", values)
    run = write_run(tmp_path, model=BLOCK)
    assert main(["import", str(source), str(run), "train.precision=bf16_params"]) == 0
    assert "22 tensors of Attention Residuals" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "r"), str(tmp_path / "again")]) == 0
    exported = contents(tmp_path / "again")
    fresh = {name: tensor for name, tensor in exported.items() if name not in values}
    assert len(fresh) == 22
    for name, tensor in fresh.items():
        assert (tensor == (1 if name.endswith("norm.weight") else 0)).all(), name
    assert_same({name: exported[name] for name in values}, values)
    masters = "optimizer.master.model.layers.4.mlp_res_norm.weight"
    state = {masters: torch.zeros(16), masters.replace("norm", "proj"): torch.ones(1, 16)}
    store.load(tmp_path / STEP_0, state, unread=("",))
    assert [tensor.sum().item() for tensor in state.values()] == [16, 0]


class Exchanged(LayerScale):
    """A residual of the user's that readers of config.json are told of."""

    def learned(self, sublayer):
        return {
            name: Learned(learned.shape, ParameterRule(normal(1.0), weight_decay=False))
            for name, learned in super().learned(sublayer).items()
        }

    def released(self):
        return {"layer_scale": True}


@pytest.mark.parametrize("precision", ["fp32", "bf16_params"])
def test_a_residual_of_the_users_starts_by_its_own_rules(tmp_path, capsys, precision):
    values = tensors(None)
    source = write_released(tmp_path / "source", values)
    kind = f"{Exchanged.__module__}:Exchanged"
    run = write_run(tmp_path, model={"residual": {"kind": kind}})
    assert main(["import", str(source), str(run), f"train.precision={precision}"]) == 0
    told = f"10 tensors of model.residual.kind {kind} are not there and start afresh"
    assert told in capsys.readouterr().out
    assert main(["export", str(tmp_path / "r"), str(tmp_path / "again")]) == 0
    exported = contents(tmp_path / "again")
    assert_same({name: exported[name] for name in values}, values)
    assert json.loads((tmp_path / "again/config.json").read_text())["layer_scale"] is True

    config = load_config(run)
    chunk = ModelChunk(config.model, 0, 5)
    init_weights(chunk, config.run.seed)
    scales = {
        n: p.bfloat16() for n, p in released_tensors(chunk.named_parameters()) if "_res_" in n
    }
    assert len(scales) == 10
    assert_same({name: exported[name] for name in scales}, scales)
    if precision == "bf16_params":
        masters = {f"optimizer.master.{name}": torch.empty(16) for name in scales}
        store.load(tmp_path / STEP_0, masters, unread=("",))
        for name, scale in scales.items():
            assert torch.equal(masters[f"optimizer.master.{name}"], scale.float())


def test_an_existing_run_folder(tmp_path, monkeypatch):
    write_released(tmp_path / "source", tensors(None))
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    write_run(tmp_path).rename(folder / "config.yaml")
    monkeypatch.chdir(tmp_path)
    assert main(["import", "source", "elsewhere", "train.train_iters=7"]) == 0
    config = load_config("elsewhere/config.yaml")
    assert (config.run.dir, config.run.name, config.train.train_iters) == (".", "elsewhere", 7)
    assert main(["export", "elsewhere/checkpoints/step_00000000", "again"]) == 0
    assert_same(contents(Path("again")), tensors(None))


def test_runs_of_before(tmp_path, capsys):
    """A run folder and a checkpoint whose config has a key that is no more, as its run meant it;
    and one that needs a class that is not there."""
    write_released(tmp_path / "source", tensors(None))
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    schedule = {"kind": "wsd", "decay_iters": 1}
    write_run(tmp_path, lr_schedule=schedule).rename(folder / "config.yaml")
    assert main(["import", str(tmp_path / "source"), str(folder)]) == 0
    assert load_config(folder / "config.yaml").lr_schedule.wsd_decay_iters == 1

    meta = folder / "checkpoints/step_00000000/meta.json"

    def has(kind: dict) -> None:
        rewrite_meta(meta, lambda saved: saved["extras"]["config"].update(lr_schedule=kind))

    has(schedule)
    assert main(["export", str(folder), str(tmp_path / "again")]) == 0
    assert_same(contents(tmp_path / "again"), tensors(None))

    own = {"kind": "gone:Square", "options": {"timescale": 3}}
    has(own)
    assert error_of(capsys, "export", folder, tmp_path / "third").startswith(
        f'error: lr_schedule.kind ({meta}) is "gone:Square" with options {{"timescale": 3}}: '
        "there is no module gone"
    )


def test_what_is_refused(tmp_path, capsys):
    source = write_released(tmp_path / "source", tensors(None))
    run = write_run(tmp_path)
    assert "no complete checkpoint" in error_of(capsys, "export", tmp_path / "r", tmp_path / "a")
    assert main(["import", str(source), str(run)]) == 0
    assert "has checkpoints already" in error_of(capsys, "import", source, run)
    assert "exists already" in error_of(capsys, "export", tmp_path / "r", source)
    odd = ["run.name=odd", "model.residual={kind: block, block_size: 3}"]
    assert main(["import", str(source), str(run), *odd]) == 0
    error = error_of(capsys, "export", tmp_path / "odd", tmp_path / "a")
    assert "blocks of 3 sublayers" in error
    assert "even model.residual.block_size" in error
    assert not list(tmp_path.glob("a*"))
    own = "kind: 'tests.model.residual.layer_scale:LayerScale'"
    for other in ("kind: block, window: 2", "kind: dense_former", own):
        changes = ["run.name=other", f"model.residual={{{other}}}"]
        assert "released models do not know" in error_of(capsys, "import", source, run, *changes)


def test_weights_that_do_not_fit_are_named_with_their_files(tmp_path, capsys):
    values = tensors(2)
    values["model.layers.2.self_attn.rotary.inv_freq"] = torch.ones(4)
    del values["model.layers.4.mlp_res_norm.weight"]
    values["model.norm.weight"] = torch.ones(17)
    values["lm_head.weight"] = torch.ones(300, 16, dtype=torch.int8)
    source = write_released(tmp_path / "source", values)
    lines = error_of(capsys, "import", source, write_run(tmp_path, model=BLOCK)).splitlines()
    assert lines[0] == f"error: {source} does not fit the config:"
    assert lines[1].strip() == "missing from its index: model.layers.4.mlp_res_norm.weight"
    assert lines[2].startswith("  not in the model of the config: model.layers.2.self_attn.rotary")
    assert lines[2].endswith("of-00003.safetensors)")
    assert "model.norm.weight ([17] F32 in model-0000" in lines[3]
    assert "[16] by the config" in lines[3]
    assert "lm_head.weight ([300, 16] I8 in model-0000" in lines[3]
    assert not (tmp_path / "r").exists()


def test_a_checkpoint_in_parts_is_exported_like_a_whole_one(tmp_path):
    values = tensors(2)
    source = write_released(tmp_path / "source", values, attn_res_block_size=2)
    assert main(["import", str(source), str(write_run(tmp_path, model=BLOCK))]) == 0
    manifest, state = read_manifest(tmp_path / STEP_0), {}
    for name in manifest.tensors:
        tensor = read_one(manifest, name)
        axis = len(name) % 2 if tensor.ndim == 2 else 0
        parts = tensor.split(max(1, tensor.shape[axis] // 3), axis) if tensor.ndim else [tensor]
        start = 0
        for part in parts:
            length = part.shape[axis] if tensor.ndim else 0
            place = whole(tensor.shape)
            place = narrowed(place, axis, start, start + length) if len(parts) > 1 else place
            state[named(name, place)], start = part, start + length
    assert len(state) > 2.5 * len(manifest.tensors)
    path = store.save(tmp_path / "cut", 0, state, manifest.extras, keep_last=1)
    assert main(["export", str(path), str(tmp_path / "again")]) == 0
    assert_same(contents(tmp_path / "again"), values)
