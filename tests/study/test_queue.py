"""The queue of a study: it survives whatever ends it, and no two get in each other's way."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attnres_train.__main__ import main
from attnres_train.errors import UserError
from attnres_train.study import results
from attnres_train.study.record import record_of
from attnres_train.study.study_file import load_study
from attnres_train.supervise.run_lock import run_lock
from tests.study.helpers import without_times, write_study
from tests.study.queued import fake, work
from tests.tiny import environment

ROOT = Path(__file__).parents[2]


def start(path: Path, seconds: float) -> subprocess.Popen:
    code = f"from tests.study.queued import main; main({str(path)!r}, '{seconds}')"
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    study = load_study(write_study(tmp_path_factory.mktemp("undisturbed")))
    assert not work(study).failed
    return record_of(study)


def test_all_runs_end_in_one_record(undisturbed):
    assert len(undisturbed["runs"]) == 8 and undisturbed["missing"] == []
    first = undisturbed["runs"][0]
    assert first["labels"] == {"kind": "standard", "lr": "0.005", "seed": "1"}
    assert [tokens for tokens, _ in first["curves"]["validation_loss"]] == [256, 512, 768, 1024]
    assert undisturbed["report"]["baseline"] == "standard"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_stopped_and_started_again(undisturbed, tmp_path, number):
    """At some moment with runs at work, twice: the same report, and no step is made twice. A study
    that is killed leaves its runs at work, and the next one waits for them."""
    path = write_study(tmp_path)
    study = load_study(path)
    for _ in range(2):
        began = made(study)
        process = start(path, 0.1)
        wait_for(lambda: made(study) > began + 2)  # noqa: B023
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode != 0
    assert not work(study).failed
    assert without_times(record_of(study)) == without_times(undisturbed)
    assert all(len(steps(study, run)) == 4 for run in study.runs)


def made(study) -> int:
    return sum(len(steps(study, run)) for run in study.runs)


def steps(study, run) -> list[str]:
    metrics = results.run_folder(study, run) / "metrics.jsonl"
    return metrics.read_text().splitlines() if metrics.exists() else []


def test_a_failed_run_is_told_and_ends_no_other(tmp_path, capsys):
    study = load_study(write_study(tmp_path))
    queue = work(study, fails="static,lr=0.01,seed=2")
    assert list(queue.failed) == ["kind=static,lr=0.01,seed=2"]
    assert "exit code 1, at step 1 of 4" in queue.failed["kind=static,lr=0.01,seed=2"]
    screen = capsys.readouterr().out
    assert "FAILED" in screen and "no such luck" in screen and "[7/8]" in screen
    record = record_of(study)
    assert len(record["runs"]) == 7 and record["missing"] == ["kind=static,lr=0.01,seed=2"]
    assert not work(study).failed  # started again it is tried again, and the others are not
    starts = [results.run_folder(study, run) / "starts" for run in study.runs]
    assert [len(file.read_text().splitlines()) for file in starts] == [1] * 7 + [2]


def test_the_same_study_twice_at_once(tmp_path, monkeypatch):
    path = write_study(tmp_path)
    with run_lock(load_study(path).folder, "study", "study.name"):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=r"study\.name: .* is in use by process \d+"):
            work(load_study(path))
        assert main(["study", str(path)]) == 2


def test_a_study_that_was_changed_is_refused(tmp_path, capsys):
    path = write_study(tmp_path)
    work(load_study(path))
    for change in ("set.train.train_iters=5", "set.model.initializer_range=0.01"):
        with pytest.raises(
            UserError, match=f"(?s)holds runs of another.*{change.split('=')[0][-5:]}"
        ):
            results.check_same(load_study(path, [change]))
    # More runs, and what changes nothing that is learnt, are welcome.
    more = load_study(path, ["axes.2.values=[1, 2, 3]", "set.log.interval=7"])
    results.check_same(more)
    work(more)
    assert len(record_of(more)["runs"]) == 12


def test_checkpoints_of_ended_runs_may_go(tmp_path):
    study = load_study(write_study(tmp_path), ["study.keep_checkpoints=false"])
    for run in study.runs[:1]:
        folder = results.run_folder(study, run) / "checkpoints" / "step_00000004"
        folder.mkdir(parents=True)
    work(study)
    assert not folder.exists() and results.read_result(study, study.runs[0])


def test_a_run_that_stops_early_is_none(tmp_path):
    study = load_study(write_study(tmp_path))
    process = subprocess.run(fake(0)(results.write_config(study, study.runs[0])), check=False)
    assert process.returncode == 0
    assert results.keep_result(study, study.runs[0]) is not None
    assert results.keep_result(study, study.runs[1]) is None
