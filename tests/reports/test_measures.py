"""What is read of run folders, and the figures that it comes to."""

from __future__ import annotations

import json

import pytest

from attnres_train.config import load_config
from attnres_train.errors import UserError
from attnres_train.reports.differences import differences
from attnres_train.reports.measures import measures, total_steps
from attnres_train.reports.page import page
from attnres_train.reports.reading import read_runs
from attnres_train.reports.summary import summary
from attnres_train.reports.table import HEADINGS, as_text, cells
from attnres_train.supervise.run_lock import run_lock
from tests.reports.folders import falling, make_run, record


def test_figures_of_a_run(tmp_path):
    losses = falling(100)
    losses[29] = 1.0  # the tenth, twentieth, ... are validated
    (run,) = read_runs([make_run(tmp_path / "a", losses)])
    found = measures(run)
    assert (found.state, found.step, found.steps, found.tokens) == ("finished", 100, 100, 10_000)
    assert (found.best_validation_step, found.best_validation_loss) == (30, 1.1)
    assert found.validation_loss == pytest.approx(losses[-1] + 0.1)
    assert (found.seconds, found.tokens_per_second, found.memory_bytes) == (200, 50, 2**30)
    # Falling by 0.01 a step, an exponential mean with weight 0.9 lags nine steps behind.
    assert found.loss == pytest.approx(losses[-1] + 0.09, abs=0.01)


def test_a_smoothed_loss_of_the_run_s_own_is_taken(tmp_path):
    folder = make_run(tmp_path / "a", [])
    (folder / "metrics.jsonl").write_text(json.dumps(record(1, 3.0, smoothed_loss=7.0)) + "\n")
    assert measures(read_runs([folder])[0]).loss == 7.0


def test_losses_of_each_corpus(tmp_path):
    folder = make_run(tmp_path / "a", [])
    parts = {"validation_loss/wiki": 1.5, "validation_loss/<b>": 2.5}
    more = {"validation_loss": 2.0, "validation_bits_per_byte/wiki": 0.5, **parts}
    lines = [record(1, 3.0, **more), record(2, 3.0)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run,) = read_runs([folder])
    assert measures(run).validation_by_corpus == {"wiki": 1.5, "<b>": 2.5}
    text = page([run])
    assert "Validation loss of wiki" in text and "Validation loss of &lt;b&gt;" in text
    config = load_config("quickstart")
    info = {"num_parameters": 1, "num_tokens": 1, "unigram_entropy": 1.0}
    records = [one | {"p2p_bytes": 1} for one in run.records]
    rows = summary(config, records, info, folder)
    assert [text for _, text in rows if " of wiki" in text] == ["1.5000 of wiki"]


def test_losses_that_are_not_finite_are_counted_and_passed_over(tmp_path):
    losses = falling(20)
    losses[4] = losses[9] = None
    (run,) = read_runs([make_run(tmp_path / "a", losses)])
    found = measures(run)
    assert found.steps_not_finite == 2 and 4.8 < found.loss < 5.0
    assert found.best_validation_step == 20
    assert "loss not finite in 2 steps" in as_text([found, found], [])


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    (run,) = read_runs([make_run(tmp_path / "a", falling(7), end='{"step": 8, "los')])
    found = measures(run)
    assert (found.step, found.state) == (7, "stopped")


def test_a_run_that_holds_its_folder_is_running(tmp_path):
    folder = make_run(tmp_path / "a", falling(7))
    with run_lock(folder):
        assert measures(read_runs([folder])[0]).state == "running"
        assert (folder / "run.lock").read_text().startswith("process ")
    assert measures(read_runs([folder])[0]).state == "stopped"


def test_folders_without_a_step_or_anything_at_all(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.yaml").write_text("run: {na")
    (tmp_path / "torn" / "info.json").write_text('{"num')
    good = make_run(tmp_path / "good", falling(10))
    runs = read_runs([tmp_path / "empty", tmp_path / "torn", good])
    found = [measures(run) for run in runs]
    assert [one.state for one in found] == ["no steps", "no steps", "stopped"]
    assert cells(found[0])[1:] == ("0", *["-"] * (len(HEADINGS) - 2))
    assert differences(runs) == []


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: there is no such run folder"):
        read_runs([make_run(tmp_path / "a", []), tmp_path / "nowhere"])


def test_runs_of_one_name_are_told_apart_and_one_folder_counts_once(tmp_path):
    first = make_run(tmp_path / "x" / "same", falling(3))
    second = make_run(tmp_path / "y" / "same", falling(3))
    assert [run.label for run in read_runs([first, second, first])] == ["x/same", "y/same"]


def test_the_steps_of_all_stages_are_those_of_the_run():
    stages = [{"train": {"train_iters": 5}}, {"name": "longer"}]
    assert total_steps({"train": {"train_iters": 3}, "stages": stages}) == 8
    assert total_steps({"train": {"train_iters": 3}}) == 3
    assert total_steps({}) is None


class TestDifferences:
    def of(self, tmp_path, *configs: str):
        folders = [make_run(tmp_path / f"r{n}", [1.0], text) for n, text in enumerate(configs)]
        return {one.key: one for one in differences(read_runs(folders))}

    def test_keys_by_run_with_their_defaults(self, tmp_path):
        found = self.of(
            tmp_path,
            "optimizer: {lr: 0.1}\n",
            "optimizer: {lr: 0.1}\nmodel: {residual: {kind: standard}}\n",
            "optimizer: {lr: 0.2}\nlog: {interval: 7}\n",
        )
        assert found["optimizer.lr"].values == ["0.1", "0.1", "0.2"]
        assert found["model.residual.kind"].values[1] == "standard"
        assert found["model.residual.kind"].values[0] == found["model.residual.kind"].values[2]
        assert list(found)[-1] == "log.interval" and not found["log.interval"].matters
        assert found["optimizer.lr"].matters and "run.name" not in found

    def test_no_difference_is_said(self, tmp_path):
        assert self.of(tmp_path, "", "") == {}
        runs = read_runs([tmp_path / "r0", tmp_path / "r1"])
        assert "no differences" in as_text([measures(run) for run in runs], [])


def test_the_table_fits_a_screen(tmp_path):
    folders = [make_run(tmp_path / ("long-name-" * 6 + end), falling(100)) for end in "ab"]
    found = [measures(run) for run in read_runs(folders)]
    lines = as_text(found, []).splitlines()
    assert max(map(len, lines[:3])) <= 120
    assert lines[1].split()[0].endswith("name-a") and lines[2].split()[0].endswith("name-b")
