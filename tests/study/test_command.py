"""`attnres-train study` on the command line; training itself at night."""

from __future__ import annotations

import json
import signal
import subprocess
import time

import pytest

from attnres_train.__main__ import main
from attnres_train.planning.devices import find_device
from attnres_train.study.price import prices
from attnres_train.study.record import record_of
from attnres_train.study.study_file import load_study
from tests.study.helpers import without_times, write_study
from tests.study.queued import work
from tests.tiny import TOKENS, command, environment, run_cli


@pytest.fixture
def path(tmp_path):
    return write_study(tmp_path)


def test_report(path, tmp_path, capsys):
    assert main(["study", "report", str(path)]) == 2
    assert "holds no run that has ended" in capsys.readouterr().err
    work(load_study(path))
    capsys.readouterr()
    record, picture = tmp_path / "record.json", tmp_path / "picture.png"
    assert main(["study", "report", str(path), "--json", str(record), "--plot", str(picture)]) == 0
    screen = capsys.readouterr().out
    assert "study small: 8 of 8 runs have ended" in screen
    assert "difference from standard, each at its best lr" in screen
    assert picture.stat().st_size > 10_000
    assert main(["study", "report", str(record)]) == 0
    assert capsys.readouterr().out == screen
    assert json.loads(record.read_text()) == record_of(load_study(path))
    written = tmp_path / "study.html"
    assert main(["study", "report", str(record), "--html", str(written)]) == 0
    assert "difference from standard, each at its best lr" in written.read_text()
    capsys.readouterr()
    assert main(["study", "report", str(record), "--html", str(tmp_path)]) == 2
    assert f"--html {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["study"], "which study?"),
        (["study", "plan", "PATH", "--jobs", "2"], "--jobs is of `study run`"),
        (["study", "report", "PATH", "study.nam=x"], "did you mean study.name"),
        (["study", "report", "no.json"], "cannot be read"),
        (["study", "report", "CONFIG.json"], "is no record of a study"),
        (["study", "nothing.yaml"], "there is no file nothing.yaml"),
    ],
)
def test_mistakes(path, tmp_path, capsys, words, told):
    (tmp_path / "x.json").write_text("{}")
    named = {"PATH": str(path), "CONFIG.json": str(tmp_path / "x.json")}
    assert main([named.get(word, word) for word in words]) == 2
    assert told in capsys.readouterr().err


def test_plan_prices_each_shape_once(path, capsys):
    study = load_study(path)
    found = prices(study, 1, find_device("cpu"))
    assert [price.runs for price in found] == [4, 4]  # kinds; not rates, nor seeds
    one = found[0]
    assert one.tokens == 4 * TOKENS
    assert one.hours == pytest.approx(4 * one.step_seconds / 3600)
    assert main(["study", "plan", str(path), "--device", "cpu"]) == 0
    screen = capsys.readouterr().out
    assert "8 runs, each on 1 x cpu: predicted" in screen


@pytest.mark.nightly
def test_real_runs_stopped_and_started_again(path, tmp_path):
    """Six runs of training, two at once on one cache: stopped by SIGTERM, killed, gone on with; the
    record is that of a study that nobody stopped."""
    words = [str(path), "axes.1.values=[1e-2]", "set.checkpoint.save_interval=1", "--jobs", "2"]
    again = [f"study.dir={tmp_path}/again", *words[1:]]
    assert run_cli("study", *words).returncode == 0
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = subprocess.Popen(command("study", words[0], *again), env=environment())
        time.sleep(15)
        process.send_signal(number)
        process.wait(timeout=120)
    assert run_cli("study", words[0], *again).returncode == 0
    one = record_of(load_study(path, words[1:3]))
    other = record_of(load_study(path, again[:3]))
    assert without_times(one) == without_times(other) and len(one["runs"]) == 4
    caches = tmp_path / "cache" / "tokenizers"
    assert not caches.is_dir() or len(list(caches.glob("*.partial"))) == 0
