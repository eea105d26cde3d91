from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from attnres_train.checkpoint.manifest import BrokenCheckpoint, read_manifest
from attnres_train.checkpoint.rng import set_rng_state
from attnres_train.checkpoint.store import load, save
from attnres_train.errors import UserError
from tests.checkpoint.toy import Toy, step_folders


def save_toy(folder: Path, step: int = 3, seed: int = 1, keep_last: int = 2, **options) -> Path:
    toy = Toy(range(2), seed=0).fill(seed)
    return save(folder, step, toy.state(), {"step": step}, keep_last=keep_last, **options)


def test_every_tensor_comes_back_bit_for_bit(tmp_path):
    saved = Toy(range(2), seed=0).fill(1).state()
    extras = {"consumed_samples": 2**40, "best": 0.1, "config": {"lr": 1e-3}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = save(tmp_path, 3, saved, extras, keep_last=2)
        fresh = Toy(range(2), seed=5)
        restored = load(path, fresh.state())
    assert path == tmp_path / "step_00000003"
    assert (restored.step, restored.extras) == (3, extras)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in fresh.state().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_dtypes_and_scalars(tmp_path, dtype):
    saved = {"a": torch.tensor([[1, 0], [1, 1]]).to(dtype), "b": torch.tensor(1).to(dtype)}
    path = save(tmp_path, 1, saved, {}, keep_last=1)
    target = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    load(path, target)
    assert all(torch.equal(target[name], saved[name]) for name in saved)


def test_a_slice_of_a_stack_is_stored_without_the_rest(tmp_path):
    stack = torch.randn(64, 100, 100)
    path = save(tmp_path, 1, {"expert.3": stack[3]}, {}, keep_last=1)
    assert sum(read_manifest(path).files.values()) < 2 * stack[3].nbytes


def test_random_numbers_continue(tmp_path):
    torch.manual_seed(3)
    torch.rand(5)
    path = save(tmp_path, 1, {"a": torch.zeros(1)}, {}, keep_last=1)
    expected = torch.rand(4)
    torch.manual_seed(9)
    set_rng_state(load(path, {"a": torch.zeros(1)}).rng)
    assert torch.equal(torch.rand(4), expected)


def test_the_weights_alone(tmp_path):
    path = save_toy(tmp_path)
    fresh = Toy(range(2), seed=5)
    weights = {name: t for name, t in fresh.state().items() if name.startswith("model.")}
    load(path, weights, unread=("optimizer.",))
    expected = Toy(range(2), seed=0).fill(1).state()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


def test_a_checkpoint_that_does_not_fit_names_the_tensors_of_both_sides(tmp_path):
    path = save_toy(tmp_path)
    target = Toy([0, 2], seed=5).state()
    query = "model.layers.0.mlp_res_proj.weight"
    target[query] = torch.full((1, 6), 3.0)
    norm = "model.layers.0.self_attn.A_log"
    target[norm] = target[norm].bfloat16()
    with pytest.raises(UserError) as error:
        load(path, target)
    lines = str(error.value).splitlines()
    assert str(path) in lines[0]
    assert "optimizer.kind" in lines[0]
    assert lines[1].startswith("  not in the checkpoint: model.layers.2.block_sparse_moe.experts.0")
    assert lines[1].endswith("and 6 more")
    assert lines[2].startswith("  in the checkpoint only: model.layers.1.")
    assert f"{query} ([1, 6] float32 here, [1, 5] float32 in the checkpoint)" in lines[3]
    assert f"{norm} ([1, 1, 2, 1] bfloat16 here, [1, 1, 2, 1] float32" in lines[3]
    assert (target[query] == 3).all()


def test_other_bytes_than_were_saved_are_found(tmp_path):
    path = save(tmp_path, 1, {"a": torch.zeros(4096), "b": torch.zeros(3)}, {}, keep_last=1)
    data = path / "rank_00000.safetensors"
    content = bytearray(data.read_bytes())
    content[content.index(bytes(8000)) + 4000] = 1
    data.write_bytes(content)
    with pytest.raises(BrokenCheckpoint, match="is damaged"):
        load(path, {"a": torch.zeros(4096), "b": torch.zeros(3)})


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "rank_00000.json", "meta.json"])
@pytest.mark.parametrize("harm", ["missing", "truncated"])
def test_missing_and_truncated_files_are_named(tmp_path, name, harm):
    file = save_toy(tmp_path) / name
    file.unlink() if harm == "missing" else file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(BrokenCheckpoint, match=name.replace(".", r"\.")):
        load(file.parent, Toy(range(2), seed=5).state())


def test_a_manifest_of_another_format_is_refused(tmp_path):
    meta = save_toy(tmp_path) / "meta.json"
    meta.write_text(meta.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(BrokenCheckpoint, match="format 3, not 2"):
        read_manifest(meta.parent)


def test_extras_must_be_json(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path, 1, {"a": torch.zeros(1)}, {"when": object()}, keep_last=1)
    assert step_folders(tmp_path) == []


def test_an_unwritable_disk_is_reported_and_publishes_nothing(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("attnres_train.checkpoint.tensor_file.os.write", full)
    with pytest.raises(RuntimeError, match=r"step 3 could not be written.*No space left"):
        save_toy(tmp_path)
    assert step_folders(tmp_path) == []
