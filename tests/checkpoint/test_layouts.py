"""Several ranks: any layout loads what any other saved, and all ranks fail together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from attnres_train.checkpoint.manifest import read_manifest
from attnres_train.checkpoint.store import load, save
from attnres_train.errors import UserError
from tests.checkpoint.toy import NUM_LAYERS, Toy, step_folders

Split = list[list[int]]
ONE = [list(range(NUM_LAYERS))]
INTERLEAVED = [[0, 1, 4], [2, 3, 5]]
THREE = [[0], [1, 2, 3, 4], [5]]
REPLICAS = [[0, 1, 2], [3, 4, 5], [0, 1, 2], [3, 4, 5]]


def save_split(folder: Path, split: Split) -> str:
    toy = Toy(split[dist.get_rank()], seed=0).fill(1)
    torch.manual_seed(dist.get_rank())
    return str(save(folder, 7, toy.state(), {"consumed_samples": 70}, keep_last=1))


def load_split(path: Path, split: Split) -> tuple[dict, bool]:
    """Load into this rank's layers; whether all of it is as saved."""
    layers = split[dist.get_rank()]
    fresh, expected = Toy(layers, seed=5), Toy(layers, seed=0).fill(1)
    restored = load(path, fresh.state())
    same = all(torch.equal(t, expected.state()[name]) for name, t in fresh.state().items())
    return restored.extras, same


def rng_after_loading(path: Path, split: Split) -> dict | None:
    return load(path, Toy(split[dist.get_rank()], seed=5).state()).rng


@pytest.mark.parametrize("saved", [ONE, INTERLEAVED, REPLICAS], ids=["1", "2", "2x2"])
def test_any_layout_loads_any_other(pool, tmp_path, saved):
    paths = pool.run(save_split, len(saved), tmp_path, saved)
    assert paths == [str(tmp_path / "step_00000007")] * len(saved)
    for split in (ONE, INTERLEAVED, THREE, REPLICAS):
        assert pool.run(load_split, len(split), Path(paths[0]), split) == [
            ({"consumed_samples": 70}, True)
        ] * len(split)


def test_replicas_are_stored_once(pool, tmp_path):
    sizes = []
    for name, split in (("two", REPLICAS[:2]), ("four", REPLICAS)):
        path = Path(pool.run(save_split, len(split), tmp_path / name, split)[0])
        files = read_manifest(path).files
        sizes.append(sum(size for file, size in files.items() if file.endswith(".safetensors")))
    assert sizes[1] < 1.1 * sizes[0]


def test_each_rank_gets_its_own_generator_back_in_the_same_number_of_ranks(pool, tmp_path):
    path = Path(pool.run(save_split, 2, tmp_path, INTERLEAVED)[0])
    states = pool.run(rng_after_loading, 2, path, INTERLEAVED)
    assert states[0] != states[1]
    assert pool.run(rng_after_loading, 3, path, THREE) == [None] * 3


def error_of(function, *args) -> str:
    try:
        function(*args)
    except (UserError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def load_shifted(path: Path) -> str:
    layers = [[0, 1, 2], [3, 4, 9]][dist.get_rank()]
    return error_of(load, path, Toy(layers, seed=5).state())


def test_all_ranks_say_together_what_does_not_fit(pool, tmp_path):
    path = Path(pool.run(save_split, 2, tmp_path, INTERLEAVED)[0])
    first, second = pool.run(load_shifted, 2, path)
    assert first == second
    assert "not in the checkpoint: model.layers.9." in first
    assert "in the checkpoint only: model.layers.5." in first


def save_drifted(folder: Path) -> str:
    toy = Toy([0], seed=0).fill(1)
    toy.params["layers.0.self_attn.q_proj.weight"].data[0, 0] += 1e-6 * dist.get_rank()
    return error_of(lambda: save(folder, 1, toy.state(), {}, keep_last=1))


def test_replicas_that_drifted_apart_are_saved_all_the_same(pool, tmp_path):
    assert pool.run(save_drifted, 2, tmp_path) == ["", ""]
    load(tmp_path / "step_00000001", Toy([0], seed=5).state())


def save_in_the_last_two_ranks(folder: Path) -> str | None:
    group = dist.new_group([1, 2], backend="gloo")
    if dist.get_rank() == 0:
        return None
    toy = Toy([dist.get_rank()], seed=0).fill(1)
    path = save(folder, 1, toy.state(), {}, keep_last=1, group=group)
    load(path, Toy([dist.get_rank()], seed=5).state(), group=group)
    return path.name


def test_a_subgroup_saves_and_loads_on_its_own(pool, tmp_path):
    results = pool.run(save_in_the_last_two_ranks, 3, tmp_path)
    assert results == [None, "step_00000001", "step_00000001"]
    assert step_folders(tmp_path) == ["step_00000001"]
