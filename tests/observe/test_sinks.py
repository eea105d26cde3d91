from __future__ import annotations

import json
import resource
from contextlib import contextmanager
from unittest import mock

from attnres_train.observe.dispatch import Observers
from attnres_train.observe.plot import LossPlot, draw_loss
from attnres_train.observe.sinks import ABANDONED, JsonLines, read_records
from tests.observe.helpers import make, record, write


def test_every_step_stands_once_after_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(make(JsonLines, tmp_path), range(1, 8), start=0)
    write(make(JsonLines, tmp_path), range(5, 11), start=4)
    assert [r["step"] for r in read_records(path)] == list(range(1, 11))


def test_a_fresh_start_begins_a_fresh_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(make(JsonLines, tmp_path), range(1, 4), start=0)
    write(make(JsonLines, tmp_path), range(1, 3), start=0)
    assert [r["step"] for r in read_records(path)] == [1, 2]


def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(record(1)) + "\n" + json.dumps(record(2))[:20])
    assert [r["step"] for r in read_records(path)] == [1]


def test_loss_plot_is_a_picture(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [record(s, **({"validation_loss": 5.0} if s == 2 else {})) for s in (1, 2, 3)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert draw_loss(path, tmp_path / "loss.png", unigram_entropy=6.0)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_no_plot_without_records(tmp_path):
    assert not draw_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")


@contextmanager
def room_for(more_bytes: int, path):
    """A file may grow by so much, as on a full disk: the write that goes beyond is done in part."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_steps_of_while_the_disk_is_full_are_written_later(tmp_path, capsys):
    path, sink = tmp_path / "metrics.jsonl", make(JsonLines, tmp_path)
    sink.on_start(0)
    sink.on_step_end(record(1))
    with room_for(20, path):
        sink.on_step_end(record(2))
        sink.on_step_end(record(3))
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]
    told = capsys.readouterr().err
    assert told.count("cannot be written") == 1 and "tried again with every step" in told
    sink.on_step_end(record(4))
    assert "is written again, with all 3 steps since" in capsys.readouterr().err
    sink.on_end()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]


def test_steps_that_cannot_be_written_are_told_at_the_end(tmp_path, capsys):
    path, sink = tmp_path / "metrics.jsonl", make(JsonLines, tmp_path)
    sink.on_start(0)
    with room_for(20, path):
        sink.on_step_end(record(1))
        sink.on_end()
    assert "the last 1 steps are not in it" in capsys.readouterr().err
    assert path.read_text() == ""


def test_a_run_folder_that_was_away_is_written_when_it_is_back(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    sink = make(JsonLines, folder)
    sink.on_start(0)
    sink.on_step_end(record(1))
    sink._close()  # as a file system does that is unmounted
    folder.rename(tmp_path / "away")
    sink.on_step_end(record(2))
    assert "cannot be written" in capsys.readouterr().err
    (tmp_path / "away").rename(folder)
    sink.on_step_end(record(3))
    sink.on_end()
    assert [r["step"] for r in read_records(folder / "metrics.jsonl")] == [1, 2, 3]


def test_a_picture_that_cannot_be_written_does_not_change_the_end(tmp_path, capsys):
    (tmp_path / "loss.png").mkdir()
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record(1)) + "\n")
    with Observers([make(LossPlot, tmp_path)]).watching(0):
        pass
    told = capsys.readouterr().err
    assert "LossPlot" in told and "Is a directory" in told and "the run is done" in told


def test_a_roll_back_leaves_every_step_once_and_what_was_undone_beside(tmp_path):
    sink = make(JsonLines, tmp_path)
    sink.on_start(0)
    for step in range(1, 6):
        sink.on_step_end(record(step))
    sink.on_roll_back(3)
    for step in range(4, 7):
        sink.on_step_end(record(step, again=1))
    sink.on_end()
    written = read_records(tmp_path / "metrics.jsonl")
    assert [(r["step"], r.get("again")) for r in written] == [
        *((step, None) for step in (1, 2, 3)),
        *((step, 1) for step in (4, 5, 6)),
    ]
    assert [r["step"] for r in read_records(tmp_path / ABANDONED)] == [4, 5]
    sink = make(JsonLines, tmp_path)
    sink.on_start(6)
    sink.on_roll_back(0)
    sink.on_step_end(record(1))
    sink.on_end()
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == [1]


def test_a_roll_back_while_the_disk_is_full(tmp_path, monkeypatch):
    sink = make(JsonLines, tmp_path)
    sink.on_start(0)
    for step in (1, 2, 3):
        sink.on_step_end(record(step))
    with monkeypatch.context() as patch:
        patch.setattr(sink, "_open", mock.Mock(side_effect=OSError(28, "No space left on device")))
        sink._close()
        sink.on_step_end(record(4))
        sink.on_roll_back(2)
        sink.on_step_end(record(3, again=1))
        assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    sink.on_step_end(record(4, again=1))
    sink.on_end()
    written = read_records(tmp_path / "metrics.jsonl")
    assert [(r["step"], r.get("again")) for r in written] == [(1, None), (2, None), (3, 1), (4, 1)]
