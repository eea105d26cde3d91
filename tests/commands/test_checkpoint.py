from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from attnres_train.__main__ import main
from attnres_train.checkpoint.manifest import read_manifest
from attnres_train.checkpoint.store import save
from attnres_train.supervise.run_lock import run_lock
from tests.checkpoint.old_format import save_old
from tests.checkpoint.toy import step_folders

CONFIG = {"parallel": {"pipeline_model_parallel_size": 2}, "optimizer": {"lr": 0.5}}


def put(run: Path, step: int, value: float = 0.0, **config: dict) -> Path:
    tensors = {"a": torch.tensor([1.0, value]), "b": torch.tensor(step), "c": torch.zeros(3)}
    extras = {"config": CONFIG | config}
    return save(run / "checkpoints", step, tensors, extras, keep_last=9)


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run"
    for step in (10, 20, 30):
        put(folder, step)
    return folder


def harm(path: Path) -> None:
    ((_, entry),) = read_manifest(path).tensors["c"].parts
    file = path / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[entry.start] ^= 1
    file.write_bytes(content)


def test_ls(run, capsys):
    (run / "checkpoints/step_00000010/rank_00000.json").unlink()
    (run / "checkpoints/step_00000040.damaged").mkdir()
    assert main(["checkpoint", "ls", str(run)]) == 0
    head, *rows = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    assert head == ["checkpoint", "size", "age", "state", "written by", "kept"]
    assert [row[0] for row in rows] == [
        "step_00000010",
        "step_00000020",
        "step_00000030",
        "step_00000040.damaged",
    ]
    assert [row[3] for row in rows] == ["rank_00000.json is missing", "whole", "whole", "set aside"]
    assert rows[1][4:] == ["1 rank, 2 x 1 stages", "among the last 2"]
    assert rows[2][5] == "newest"


def test_verify(run, capsys):
    steps = [run / "checkpoints" / f"step_000000{step}" for step in (10, 20, 30)]
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{step}: whole (3 tensors, 28 B)" for step in steps
    ]
    harm(steps[1])
    assert main(["checkpoint", "verify", str(run)]) == 1
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.endswith("whole (3 tensors, 28 B)") and third.endswith("whole (3 tensors, 28 B)")
    assert second == f"{steps[1]}: DAMAGED: c in rank_00000.safetensors: other bytes"
    assert main(["checkpoint", "verify", str(steps[0])]) == 0
    assert main(["checkpoint", "verify", str(steps[1])]) == 1


def test_verify_one_of_before(tmp_path, capsys):
    path = save_old(tmp_path, 3, {"a": torch.zeros(5000), "b": torch.ones(2)}, {})
    assert main(["checkpoint", "verify", str(path)]) == 0
    data = path / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[content.index(bytes(8000)) + 4000] = 1
    data.write_bytes(content)
    assert main(["checkpoint", "verify", str(path)]) == 1
    assert ": a: " in capsys.readouterr().out.splitlines()[1]


def test_prune_tells_first_and_deletes_when_told(run, capsys):
    (run / "checkpoints/step_00000040.tmp-7").mkdir()
    assert main(["checkpoint", "prune", str(run)]) == 0
    told = capsys.readouterr().out
    assert "would delete" in told and "step_00000010 (" in told and "--yes" in told
    assert len(step_folders(run / "checkpoints")) == 4
    assert main(["checkpoint", "prune", str(run), "--yes"]) == 0
    assert step_folders(run / "checkpoints") == ["step_00000020", "step_00000030"]
    capsys.readouterr()
    assert main(["checkpoint", "prune", str(run), "--yes"]) == 0
    assert capsys.readouterr().out == "nothing to delete\n"


def test_prune_by_the_runs_own_rules_or_others(tiny, capsys):
    folder = tiny.train("to-prune", "checkpoint.keep_last=9", "checkpoint.save_interval=2")
    assert main(["checkpoint", "prune", str(folder)]) == 0
    assert capsys.readouterr().out == "nothing to delete\n"
    assert main(["checkpoint", "prune", str(folder), "checkpoint.keep_last=1"]) == 0
    told = capsys.readouterr().out
    assert "step_00000002" in told and "step_00000004" in told and "step_00000006" not in told
    rules = ["checkpoint.keep_last=1", "checkpoint.keep_every=4"]
    assert main(["checkpoint", "prune", str(folder), *rules, "--yes"]) == 0
    assert step_folders(folder / "checkpoints") == ["step_00000004", "step_00000006"]


def test_a_run_at_work_is_not_pruned(run, capsys):
    with run_lock(run):
        assert main(["checkpoint", "prune", str(run), "--yes"]) == 2
    assert "is in use by" in capsys.readouterr().err
    assert len(step_folders(run / "checkpoints")) == 3


def test_diff(run, tmp_path, capsys):
    first, other = run / "checkpoints/step_00000010", tmp_path / "other"
    assert main(["checkpoint", "diff", str(first), str(first)]) == 0
    assert "all 3 tensors are equal" in capsys.readouterr().out
    put(other, 10, value=2.0, optimizer={"lr": 0.25})
    assert main(["checkpoint", "diff", str(first), str(other)]) == 1
    told = capsys.readouterr().out
    assert "config: optimizer.lr 0.5 -> 0.25\n" in told
    assert re.search(r"^a +\[2\] +2 +2$", told, re.M)
    assert told.endswith("1 tensors differ, 2 are equal\n")
    old = save_old(tmp_path, 3, {"a": torch.ones(2), "d": torch.ones(2)}, {})
    assert main(["checkpoint", "diff", str(first), str(old)]) == 1
    told = capsys.readouterr().out
    assert re.search(r"^a +\[2\] +1 +1$", told, re.M)
    assert re.search("^b +in the first only$", told, re.M)
    assert re.search("^d +in the second only$", told, re.M)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ls", "{gone}"], "there is no such folder"),
        (["verify", "{empty}"], "holds no checkpoint"),
        (["ls", "{empty}"], "holds no checkpoint"),
        (["diff", "{run}"], "diff takes two"),
        (["ls", "{run}", "more"], "more is too many"),
        (["verify", "{run}", "--yes"], "--yes: verify deletes nothing"),
        (["prune", "{run}", "checkpoint.keep_last=1"], "config.yaml is missing"),
    ],
)
def test_what_is_refused(run, tmp_path, capsys, words, said):
    (tmp_path / "empty").mkdir()
    places = {name: tmp_path / name for name in ("run", "empty", "gone")}
    assert main(["checkpoint", *(word.format_map(places) for word in words)]) == 2
    assert said in capsys.readouterr().err
