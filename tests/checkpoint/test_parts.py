"""Tensors that lie in parts: whatever cuts were written, any others are read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnres_train.__main__ import main
from attnres_train.checkpoint import tensor_file
from attnres_train.checkpoint.manifest import META, BrokenCheckpoint, list_name, read_manifest
from attnres_train.checkpoint.store import load, save
from attnres_train.checkpoint.verify import differences, read_one, verify
from attnres_train.errors import UserError
from tests.checkpoint.cuts import SHAPES, blank, dealt, held, originals
from tests.checkpoint.toy import rewrite_meta

TABLE = torch.arange(24.0).view(8, 3)
HALVES = {"table[0:4 of 8]": TABLE[:4], "table[4:8 of 8]": TABLE[4:]}
COLUMNS = {"table[:, 0:2 of 3]": TABLE[:, :2], "table[:, 2:3 of 3]": TABLE[:, 2:]}


def put(folder: Path, tensors: dict[str, Tensor], step: int = 1) -> Path:
    return save(folder, step, tensors, {}, keep_last=9)


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**31), st.integers(0, 2**31), st.sampled_from([1, 17, 2**24]))
def test_any_cut_is_read_from_any_other(tmp_path_factory, written, read, chunk):
    folder, tensors = tmp_path_factory.mktemp("cut"), originals(written)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_file, "_CHUNK_BYTES", chunk)
        path = put(folder, held(tensors, dealt(written, 1)[0]))
        expected = held(tensors, dealt(read, 1)[0])
        found = blank(expected)
        load(path, found)
    assert equal(found, expected)
    manifest = read_manifest(path)
    assert all(torch.equal(read_one(manifest, name), tensors[name]) for name in SHAPES)
    assert not verify(path).problems


def save_dealt(folder: Path, seeds: list[int]) -> None:
    for seed in seeds:
        hand = dealt(seed, dist.get_world_size())[dist.get_rank()]
        put(folder, held(originals(seed), hand), seed)


def load_dealt(folder: Path, seeds: list[int]) -> list[bool]:
    """Runs on every rank: whether its own parts, of other cuts, are as they were saved."""
    results = []
    for seed in seeds:
        hand = dealt(seed + 1000, dist.get_world_size())[dist.get_rank()]
        expected = held(originals(seed), hand)
        found = blank(expected)
        load(folder / f"step_{seed:08d}", found)
        results.append(equal(found, expected))
    return results


@pytest.mark.parametrize(("writers", "readers"), [(1, 3), (3, 2), (2, 1)])
def test_any_number_of_ranks_reads_what_any_other_wrote(pool, tmp_path, writers, readers):
    seeds = list(range(1, 9))
    pool.run(save_dealt, writers, tmp_path, seeds)
    assert pool.run(load_dealt, readers, tmp_path, seeds) == [[True] * len(seeds)] * readers


def test_where_nothing_is_cut_the_format_is_that_of_before(tmp_path):
    assert b'"format": 2' in (put(tmp_path, {"table": TABLE}, 1) / META).read_bytes()
    assert b'"format": 3' in (put(tmp_path, HALVES, 2) / META).read_bytes()


@pytest.mark.parametrize("parts", [HALVES, COLUMNS, {"table": TABLE}])
@pytest.mark.parametrize("fault", ["forgotten", "shifted"])
def test_a_part_that_no_rank_asks_for_is_missed(tmp_path, parts, fault):
    path = put(tmp_path, parts)
    wanted = dict(HALVES)
    part = wanted.pop("table[4:8 of 8]")
    if fault == "shifted":
        wanted["table[3:7 of 8]"] = part
    target = blank(wanted)
    with pytest.raises(RuntimeError, match=r"table\[[47]:8 of 8\] is missing: no rank asks for it"):
        load(path, target)
    assert not any(tensor.any() for tensor in target.values())


def save_without(folder: Path, rank: int, renamed: str | None) -> str:
    """Runs on every rank: what is said where one rank has no part, or names it otherwise."""
    name, part = list(HALVES.items())[dist.get_rank()]
    mine = {name: part, f"own.{dist.get_rank()}": torch.zeros(2)}
    if dist.get_rank() == rank:
        del mine[name]
        mine |= {renamed: part} if renamed else {}
    try:
        put(folder, mine)
    except ValueError as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize(
    ("renamed", "told"),
    [
        (None, "table[4:8 of 8] is missing"),
        ("table[2:6 of 8]", "table[0:4 of 8] and table[2:6 of 8] overlap"),
        ("table[4:8 of 9]", "parts of table are of different tensors: [8, 3] float32 and [9, 3]"),
    ],
)
def test_parts_that_are_not_all_of_a_tensor_are_never_saved(pool, tmp_path, renamed, told):
    first, second = pool.run(save_without, 2, tmp_path, 1, renamed)
    assert first == second and told in first
    assert list(tmp_path.glob("step_*")) == []


def save_halves(folder: Path) -> None:
    put(folder, dict([list(HALVES.items())[dist.get_rank()]]))


@pytest.fixture
def halves(pool, tmp_path) -> Path:
    pool.run(save_halves, 2, tmp_path)
    return tmp_path / "step_00000001"


def test_a_hole_is_refused_by_its_range_before_anything_is_touched(halves, capsys):
    def forget(content: dict) -> None:
        for name in (list_name(1), "rank_00001.safetensors"):
            del content["files"][name]
            (halves / name).unlink()
        del content["lists"][list_name(1)]

    rewrite_meta(halves / META, forget)
    target = torch.zeros(8, 3)
    with pytest.raises(BrokenCheckpoint, match=r"table\[4:8 of 8\] is missing"):
        load(halves, {"table": target})
    assert not target.any()
    assert verify(halves).problems == ["table[4:8 of 8] is missing"]
    assert main(["checkpoint", "verify", str(halves)]) == 1
    assert "DAMAGED: table[4:8 of 8] is missing" in capsys.readouterr().out


def test_an_overlap_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("attnres_train.checkpoint.sharing._check_parts", lambda by_rank: None)
    path = put(tmp_path, HALVES | {"table[3:5 of 8]": TABLE[3:5]})
    with pytest.raises(BrokenCheckpoint, match=r"table\[0:4 of 8\] and table\[3:5 of 8\] overlap"):
        load(path, {"table": torch.zeros(8, 3)})
    assert "overlap" in verify(path).problems[0]


def test_a_part_with_other_bytes_is_named(halves):
    (_, (_, entry)) = read_manifest(halves).tensors["table"].parts
    file = halves / entry.file
    content = bytearray(file.read_bytes())
    content[entry.start + 5] ^= 1
    file.write_bytes(content)
    told = rf"table\[4:8 of 8\] in {entry.file}: other bytes"
    for name, wanted in ({"table": TABLE} | COLUMNS).items():
        others = {n: t for n, t in COLUMNS.items() if n != name and name != "table"}
        with pytest.raises(BrokenCheckpoint, match=told):
            load(halves, blank({name: wanted, **others}))
    assert re.match(told, verify(halves).problems[0])


def test_what_does_not_fit_is_told_with_whole_shapes(tmp_path):
    path = put(tmp_path, HALVES)
    with pytest.raises(UserError) as error:
        load(path, {"table[0:4 of 9]": torch.zeros(4, 3), "other[0:1 of 2]": torch.zeros(1)})
    assert "not in the checkpoint: other[0:1 of 2]" in str(error.value)
    assert "table[0:4 of 9] ([9, 3] float32 here, [8, 3] float32 in the ch" in str(error.value)


def test_differences_do_not_mind_the_cuts(tmp_path):
    moved = {name: tensor.clone() for name, tensor in HALVES.items()}
    moved["table[4:8 of 8]"][1, 1] += 2
    paths = [put(tmp_path, t, i) for i, t in enumerate([HALVES, COLUMNS, {"table": TABLE}, moved])]
    manifests = [read_manifest(path) for path in paths]
    assert not list(differences(manifests[0], manifests[1]))
    assert not list(differences(manifests[1], manifests[2]))
    for other in manifests[:3]:
        (found,) = differences(other, manifests[3])
        assert (found.name, found.largest) == ("table", 2.0)
