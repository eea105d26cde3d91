"""Saves beside training: what is in them, what becomes of those that fail, how little travels."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from attnres_train.checkpoint import saver
from attnres_train.checkpoint.folders import Keep, find_latest
from attnres_train.checkpoint.manifest import list_name, read_manifest
from attnres_train.checkpoint.publishing import Report, begin, publish
from attnres_train.checkpoint.rng import set_rng_state
from attnres_train.checkpoint.saver import Outcome, Saver
from attnres_train.checkpoint.sharing import share_of
from attnres_train.checkpoint.staging import HostBuffers
from attnres_train.checkpoint.store import load
from attnres_train.checkpoint.tensor_file import spec
from tests.checkpoint.toy import Toy, step_folders
from tests.parity.pool import RankFailedError

KEEP = Keep(last=2)


def put(maker: Saver, step: int, **extras: object) -> Outcome:
    maker.start(step, extras, loaded_from=None)
    outcome = maker.wait()
    assert outcome is not None
    return outcome


@contextmanager
def held_up(point: str) -> Iterator[threading.Event]:
    """Whoever comes to ``point`` of the saver waits there until the event is set."""
    go_on, original = threading.Event(), getattr(saver, point)

    def wait_first(*args):
        assert go_on.wait(300)
        return original(*args)

    with mock.patch.object(saver, point, wait_first):
        try:
            yield go_on
        finally:
            go_on.set()


@pytest.mark.parametrize("point", ["begin", "write_tensors", "checksum", "write_file", "publish"])
def test_the_state_is_that_of_the_step_however_long_it_takes(tmp_path, point):
    tensors, progress = {"a": torch.ones(5), "b": torch.ones((), dtype=torch.int64)}, {"step": 1}
    maker = Saver(tmp_path, tensors, keep=KEEP)
    torch.manual_seed(1)
    expected = torch.get_rng_state()
    with held_up(point) as go_on:
        maker.start(1, {"progress": progress}, loaded_from=None)
        assert maker.busy
        assert find_latest(tmp_path) is None
        for tensor in tensors.values():
            tensor += 1
        progress["step"] = 2
        torch.manual_seed(2)
        go_on.set()
        assert maker.wait() == Outcome(1, tmp_path / "step_00000001")
    assert not maker.busy
    first = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    restored = load(tmp_path / "step_00000001", first)
    assert all((tensor == 1).all() for tensor in first.values())
    assert restored.extras == {"progress": {"step": 1}}
    set_rng_state(restored.rng)
    assert torch.equal(torch.get_rng_state(), expected)

    put(maker, 2)
    load(tmp_path / "step_00000002", first)
    assert all((tensor == 2).all() for tensor in first.values())


def test_any_reader_of_safetensors_opens_the_files(tmp_path):
    state = Toy(range(2), seed=0).fill(1).state()
    path = put(Saver(tmp_path, state, keep=KEEP), 1).path
    found = load_file(path / "rank_00000.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())


def test_buffers_of_several_segments(monkeypatch):
    monkeypatch.setattr("attnres_train.checkpoint.staging.SEGMENT_BYTES", 16)
    tensors = [torch.arange(7), torch.tensor(3.0), torch.arange(5, dtype=torch.int16)]
    buffers = HostBuffers(7 * 8 + 4 + 10, pinned=False)
    buffers.fill(tensors)
    expected = b"".join(tensor.numpy().tobytes() for tensor in tensors)
    for start, stop in ((0, 70), (56, 60), (15, 33), (16, 32), (4, 4)):
        assert b"".join(buffers.read(start, stop)) == expected[start:stop]


def failing(where: str, error: OSError) -> mock._patch:
    return mock.patch(f"attnres_train.checkpoint.{where}", side_effect=error)


def save_thrice(folder: Path, where: str, rank: int) -> list[tuple[Outcome, list[str]]]:
    """The second save fails on ``rank``."""
    tensors = {f"a.{dist.get_rank()}": torch.zeros(4)}
    maker, seen = Saver(folder, tensors, keep=KEEP), []
    for step in (1, 2, 3):
        tensors[f"a.{dist.get_rank()}"].fill_(step)
        if step == 2 and dist.get_rank() == rank:
            with failing(where, OSError(28, "No space left on device")):
                outcome = put(maker, step)
        else:
            outcome = put(maker, step)
        seen.append((outcome, step_folders(folder)))
        dist.barrier()
    return seen


@pytest.mark.parametrize(
    ("where", "rank"),
    [
        ("publishing.Path.mkdir", 0),
        ("saver.write_tensors", 0),
        ("saver.write_tensors", 1),
        ("tensor_file.os.fsync", 1),
        ("saver.checksum", 1),
        ("saver.write_file", 1),
        ("publishing.write_file", 0),
        ("folders.Path.rename", 0),
    ],
)
def test_a_failed_save_is_none_for_all_ranks_and_the_next_is_as_ever(pool, tmp_path, where, rank):
    first, second = pool.run(save_thrice, 2, tmp_path, where, rank)
    assert [outcome for outcome, _ in first] == [outcome for outcome, _ in second]
    failed, left = first[1]
    assert failed.path is None
    assert f"rank {rank} on " in failed.problem and "No space left" in failed.problem
    assert left == ["step_00000001"]
    assert step_folders(tmp_path) == ["step_00000001", "step_00000003"]
    found = {f"a.{rank}": torch.zeros(4) for rank in range(2)}
    load(tmp_path / "step_00000003", found)
    assert all((tensor == 3).all() for tensor in found.values())


def save_where_disks_differ(folder: Path) -> Outcome:
    def elsewhere(path: Path, *args) -> None:
        other = folder.with_name("other disk")
        other.mkdir()
        original(other / path.name, *args)

    original = saver.write_tensors
    with mock.patch("attnres_train.checkpoint.publishing.SEEN_SECONDS", 0.2):
        maker = Saver(folder, {f"a.{dist.get_rank()}": torch.zeros(4)}, keep=KEEP)
        if dist.get_rank() == 0:
            return put(maker, 1)
        with mock.patch.object(saver, "write_tensors", elsewhere):
            return put(maker, 1)


def test_a_folder_that_ranks_do_not_share_is_named(pool, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    outcome, other = pool.run(save_where_disks_differ, 2, folder)
    assert outcome == other
    assert "rank_00001.safetensors is missing for this rank" in outcome.problem
    assert "a disk that all machines share" in outcome.problem
    assert step_folders(folder) == []


def test_where_the_folder_is_gone_nothing_is_made_in_its_place(tmp_path):
    folder = tmp_path / "mount" / "checkpoints"
    folder.mkdir(parents=True)
    maker = Saver(folder, {"a": torch.zeros(1)}, keep=KEEP)
    folder.rmdir()
    assert "No such file or directory" in put(maker, 1).problem
    assert not folder.exists()
    folder.mkdir()
    assert put(maker, 2).path == folder / "step_00000002"


def test_pruning_that_fails_fails_no_save(tmp_path, caplog):
    with failing("folders.surplus", OSError(5, "Input/output error")):
        assert put(Saver(tmp_path, {"a": torch.zeros(1)}, keep=KEEP), 1).path
    assert "Input/output error" in caplog.text


def lose_a_peer(folder: Path) -> None:
    maker = Saver(folder, {"a": torch.zeros(1)}, keep=KEEP)
    if dist.get_rank() == 1:
        maker._write = lambda *_: dist.distributed_c10d.os._exit(9)
    put(maker, 1)


def test_a_lost_peer_ends_the_wait(pool, tmp_path):
    with pytest.raises(RankFailedError, match=r"(?i)connection|peer|process died"):
        pool.run(lose_a_peer, 2, tmp_path)
    assert find_latest(tmp_path) is None


def what_is_written(folder: Path, share: Callable[[int], list[int]]) -> list[str]:
    state = Toy(share(dist.get_rank()), seed=0).fill(1).state()
    put(Saver(folder, state, keep=KEEP), 1)
    return share_of({name: spec(tensor) for name, tensor in state.items()}, saver.Peers())


def alike(_rank: int) -> list[int]:
    return [0, 1]


def test_replicas_write_an_even_share_each(pool, tmp_path):
    shares = pool.run(what_is_written, 3, tmp_path, alike)
    names = [name for share in shares for name in share]
    state = Toy([0, 1], seed=0).state()
    assert sorted(names) == sorted(state)
    sizes = [sum(state[name].nbytes for name in share) for share in shares]
    assert max(sizes) - min(sizes) <= max(tensor.nbytes for tensor in state.values())
    manifest = read_manifest(tmp_path / "step_00000001")
    assert manifest.num_ranks == 3
    assert manifest.tensors.keys() == state.keys()


def test_of_a_thousand_ranks_little_travels_and_all_is_checked(tmp_path):
    """Rank 0's part of a save of 1,024: what it hears, and that it sees every file."""
    unfinished, reports = begin(tmp_path, 1), []
    for rank in range(1024):
        name, text = list_name(rank), b"%d" % rank
        (unfinished / name).write_bytes(text)
        reports.append(Report.of(name, text, {}))
    assert max(len(pickle.dumps(report)) for report in reports) < 300
    missing = unfinished / list_name(1000)
    missing.rename(tmp_path / "aside")
    with (
        mock.patch("attnres_train.checkpoint.publishing.SEEN_SECONDS", 0),
        pytest.raises(FileNotFoundError, match=r"rank_01000\.json is missing"),
    ):
        publish(unfinished, 1, {}, KEEP, None, reports)
    (tmp_path / "aside").rename(missing)
    path = publish(unfinished, 1, {}, KEEP, None, reports)
    assert read_manifest(path).num_ranks == 1024
    assert (path / "meta.json").stat().st_size < 100 * 1024
