"""Checkpoints of before: `meta.json` in format 1, tensors in files of torch's own."""

from __future__ import annotations

import pytest
import torch

from attnres_train.checkpoint.folders import find_latest
from attnres_train.checkpoint.manifest import BrokenCheckpoint, read_manifest
from attnres_train.checkpoint.store import load, save
from tests.checkpoint.old_format import save_old
from tests.checkpoint.toy import Toy


@pytest.fixture
def old(tmp_path):
    torch.manual_seed(5)
    return save_old(tmp_path, 3, Toy(range(2), seed=0).fill(1).state(), {"progress": {"step": 3}})


def test_it_loads_bit_for_bit(old):
    fresh, expected = Toy(range(2), seed=5), Toy(range(2), seed=0).fill(1).state()
    restored = load(old, fresh.state())
    assert (restored.step, restored.extras) == (3, {"progress": {"step": 3}})
    assert restored.rng is not None
    assert all(torch.equal(tensor, expected[name]) for name, tensor in fresh.state().items())
    assert read_manifest(old).tensors.keys() == expected.keys()


def test_it_loads_in_parts(tmp_path):
    table = torch.arange(24.0).view(8, 3)
    path = save_old(tmp_path, 1, {"table": table, "a": torch.ones(2)}, {})
    parts = {"table[0:5 of 8]": torch.zeros(5, 3), "table[5:8 of 8]": torch.zeros(3, 3)}
    load(path, parts | {"a": torch.zeros(2)})
    assert torch.equal(torch.cat([*parts.values()]), table)
    del parts["table[0:5 of 8]"]
    with pytest.raises(RuntimeError, match=r"table\[0:5 of 8\] is missing: no rank asks for it"):
        load(path, parts | {"a": torch.zeros(2)})


def test_a_new_one_is_newer(old):
    path = save(old.parent, 3, Toy(range(2), seed=0).state(), {}, keep_last=2)
    assert path == old == find_latest(old.parent)
    assert not read_manifest(path).is_old


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.json"])
@pytest.mark.parametrize("harm", ["missing", "truncated"])
def test_missing_and_truncated_files_are_named(old, name, harm):
    file = old / name
    file.unlink() if harm == "missing" else file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(BrokenCheckpoint, match=name.replace(".", r"\.")):
        load(old, Toy(range(2), seed=5).state())


def test_other_bytes_than_were_saved_are_found(tmp_path):
    path = save_old(tmp_path, 1, {"a": torch.zeros(4096), "b": torch.zeros(3)}, {})
    data = path / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[content.index(bytes(8000)) + 4000] = 1
    data.write_bytes(content)
    with pytest.raises(BrokenCheckpoint, match="is damaged"):
        load(path, {"a": torch.zeros(4096), "b": torch.zeros(3)})


def test_tensors_read_wrongly_are_found(tmp_path, monkeypatch):
    path = save_old(tmp_path, 1, {"a": torch.ones(3), "b": torch.ones(2)}, {})

    def swapped(tensors, **_):
        tensors["a"].fill_(2)
        tensors["b"].fill_(1)

    monkeypatch.setattr("attnres_train.checkpoint.old_format.dcp.load", swapped)
    with pytest.raises(BrokenCheckpoint, match=r"is damaged: a$"):
        load(path, {"a": torch.zeros(3), "b": torch.zeros(2)})
