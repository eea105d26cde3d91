"""Reading and writing folders of safetensors files."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from attnres_train.checkpoint.huggingface import INDEX, ReleasedWeights, write_weights
from attnres_train.checkpoint.streaming import in_groups
from attnres_train.errors import UserError
from tests.checkpoint.released import tensors, write_released

VALUES = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.arange(4).bfloat16(),
    "c": torch.tensor(3.0),
    "d": torch.arange(12.0).view(3, 4),
}
LAYOUT = {name: tensor.to("meta") for name, tensor in VALUES.items()}


def select(names: list[str]) -> dict[str, torch.Tensor]:
    return {name: VALUES[name].clone() for name in names}


def test_files_are_filled_in_order_up_to_the_limit(tmp_path):
    assert write_weights(tmp_path, LAYOUT, select, file_bytes=32) == 3
    held = {file.name: sorted(load_file(file)) for file in tmp_path.glob("*.safetensors")}
    assert held == {
        "model-00001-of-00003.safetensors": ["a", "b"],
        "model-00002-of-00003.safetensors": ["c"],
        "model-00003-of-00003.safetensors": ["d"],
    }
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 24 + 8 + 4 + 48
    assert index["weight_map"] == {name: file for file, names in held.items() for name in names}
    weights = ReleasedWeights(tmp_path)
    for name, value in VALUES.items():
        assert torch.equal(weights.read(name), value)
    weights.check_fit(LAYOUT)


@pytest.mark.parametrize("limit", [1, 7, 8, 100])
def test_groups_keep_order_and_limit(limit):
    sizes = [3, 5, 1, 9, 2, 2]
    groups = in_groups(sizes, int, limit)
    assert [size for group in groups for size in group] == sizes
    assert all(sum(group) <= limit or len(group) == 1 for group in groups)
    assert all(sum(group) + after[0] > limit for group, after in pairwise(groups))


def test_a_single_file_needs_no_index(tmp_path):
    save_file(VALUES, tmp_path / "model.safetensors")
    weights = ReleasedWeights(tmp_path)
    weights.check_fit(LAYOUT)
    assert torch.equal(weights.read("d"), VALUES["d"])


@pytest.mark.parametrize(
    ("shape", "fits"), [([2], True), ([1, 1, 2, 1], True), ([2, 2], False), ([128], False)]
)
def test_the_decay_of_heads_has_any_number_of_dimensions(tmp_path, shape, fits):
    name = "model.layers.0.self_attn.A_log"
    save_file({name: torch.zeros(shape)}, tmp_path / "model.safetensors")
    wanted = {name: torch.empty(1, 1, 2, 1, device="meta")}
    if fits:
        ReleasedWeights(tmp_path).check_fit(wanted)
    else:
        with pytest.raises(UserError, match=r"A_log .*in model\.safetensors"):
            ReleasedWeights(tmp_path).check_fit(wanted)


def truncate(source: Path) -> None:
    file = source / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def remove_shard(source: Path) -> None:
    (source / "model-00003-of-00003.safetensors").unlink()


def remove_index(source: Path) -> None:
    (source / INDEX).unlink()


def cut_index(source: Path) -> None:
    (source / INDEX).write_text((source / INDEX).read_text()[:-9])


def misplace(source: Path) -> None:
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "model-00003-of-00003.safetensors"
    (source / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, r"model-00002-of-00003\.safetensors cannot be read"),
        (remove_shard, r"model-00003-of-00003\.safetensors cannot be read"),
        (remove_index, r"index\.json cannot be read \(No such file"),
        (cut_index, r"index\.json is damaged \(JSONDecodeError"),
        (misplace, r"files lack: model\.norm\.weight \(model-00003-of-00003\.safetensors\)"),
    ],
)
def test_damage_is_named(tmp_path, harm, message):
    source = write_released(tmp_path / "source", tensors(None))
    harm(source)
    with pytest.raises(UserError, match=message):
        ReleasedWeights(source)
