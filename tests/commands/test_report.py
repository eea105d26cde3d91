"""The summary that a run ends with."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest

from attnres_train.__main__ import main
from attnres_train.errors import UserError
from attnres_train.planning.build import build_plan
from tests.tiny import SAMPLES, STEPS, column, grid


@pytest.fixture(scope="module")
def piped(tiny):
    return tiny.train("whole-2x2", *grid(2, 2), ranks=2)


@pytest.fixture
def rows(piped, capsys) -> dict[str, str]:
    assert main(["report", str(piped)]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {
        label.strip(): text
        for label, text in (line.split("  ", 1) for line in map(str.strip, lines))
    }


def test_losses_and_speed(rows, piped):
    losses = column(piped, "loss")
    assert rows["loss"].startswith(f"{losses[0]:.4f} at step 1, {losses[-1]:.4f} at ")
    assert rows["validation"] == f"{column(piped, 'validation_loss')[-1]:.4f}"
    assert rows["run"] == f"{piped}: step {STEPS} of {STEPS}, finished"
    assert re.fullmatch(r"[\d,]+ tokens/s \(median\), \d+ s in steps", rows["speed"])
    assert re.match(r"\d\.\d{4} is the entropy", rows["unigram"])


def test_bytes_against_the_full_history(rows, tiny):
    units = build_plan(tiny.config(*grid(2, 2))).units()
    sent = STEPS * 2 * units.exact * (SAMPLES // 2) * (2 * 32 * 32 * 4)
    full = sent * units.naive / units.exact
    assert rows["sent"] == (
        f"{sent / 1e3:.1f} KB between stages; the full history on every hop would have been "
        f"{full / 1e6:.1f} MB ({units.naive / units.exact:.2f}x)"
    )


def test_where_things_lie(rows, piped):
    assert rows["checkpoint"] == str(piped / "checkpoints" / f"step_{STEPS:08d}")
    assert "loss plot" not in rows


def test_where_the_drawn_losses_lie(tiny, capsys):
    run = tiny.train("drawn", "log.plot=true", "train.train_iters=2")
    assert main(["report", str(run)]) == 0
    assert re.search(rf"^ *loss plot  {run / 'loss.png'}$", capsys.readouterr().out, re.M)


def test_a_config_stands_for_its_run(tiny, rows, piped, capsys):
    assert main(["report", str(tiny.path), f"run.name={piped.name}"]) == 0
    assert f"{piped}: step {STEPS} of {STEPS}, finished\n" in capsys.readouterr().out


def test_a_run_of_before_is_told_alike(piped, tmp_path, capsys):
    """One whose config has a key that is no more."""
    assert main(["report", str(piped)]) == 0
    now = capsys.readouterr().out
    old = shutil.copytree(piped, tmp_path / piped.name)
    config = (old / "config.yaml").read_text()
    aged = config.replace("  decay_end_iter: null\n  wsd_decay_iters: null\n", "  decay_iters: 9\n")
    (old / "config.yaml").write_text(aged)
    assert aged != config and main(["report", str(old)]) == 0
    assert capsys.readouterr().out.replace(str(old), str(piped)) == now


def test_what_is_known_of_the_data_may_be_gone(piped, tmp_path, capsys):
    """Of a folder that was copied in part."""
    part = tmp_path / piped.name
    part.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(piped / name, part)
    assert main(["report", str(part)]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^ *model  residual block$", told, re.M) and "unigram" not in told


def test_pictures_of_what_was_observed(tiny, piped, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    blind = tiny.train("blind", "observe.interval=0", "train.train_iters=1")
    folder = tmp_path / "pictures"
    assert main(["report", str(blind), str(piped), "--pictures", str(folder)]) == 0
    assert {path.parent.name for path in folder.rglob("*.png")} == {piped.name}
    assert (folder / piped.name / "depth_attention.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert main(["report", str(blind), "--pictures", str(folder)]) == 2
    assert f"--pictures {folder}: nothing was observed in {blind}" in capsys.readouterr().err


def test_one_stage_sends_nothing(tiny, capsys):
    run = tiny.train("whole-1x1", *grid(1, 1))
    assert main(["report", str(run)]) == 0
    assert "nothing between stages" in capsys.readouterr().out


def test_a_folder_without_a_run(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.parametrize("more", ["runs/other", "run.name=x"])
def test_nothing_on_the_line_is_passed_over(piped, capsys, more):
    assert main(["report", str(piped), more]) == 2
    assert more in capsys.readouterr().err


@pytest.mark.parametrize("more", ["--htm", "--lr=3"])
def test_an_unknown_option(piped, capsys, more):
    with pytest.raises((SystemExit, UserError)) as end:
        raise SystemExit(main(["report", str(piped), more]))
    assert end.value.code == 2 and more in capsys.readouterr().err


class TestSeveral:
    @pytest.fixture
    def other(self, tiny):
        return tiny.train("whole-1x1", *grid(1, 1))

    def test_a_table_and_what_sets_them_apart(self, piped, other, capsys):
        assert main(["report", str(piped), str(other)]) == 0
        head, first, second, _, title, *rows = capsys.readouterr().out.splitlines()
        assert head.split()[:4] == ["run", "step", "tokens", "loss"]
        assert (first.split()[0], second.split()[0]) == (piped.name, other.name)
        best = min(column(piped, "validation_loss"))
        assert f"{best:.4f} at " in first and f"{STEPS}/{STEPS}" in first
        assert title == f"differences ({piped.name} | {other.name})"
        assert "parallel.pipeline_model_parallel_size" in {row.split()[0] for row in rows}

    def test_configs_stand_for_runs_here_too(self, tiny, piped, other, capsys):
        words = [str(other), str(tiny.path), f"run.name={piped.name}"]
        assert main(["report", *words]) == 0
        assert f"\n{piped.name} " in capsys.readouterr().out

    def test_as_json(self, piped, other, capsys):
        assert main(["report", str(piped), str(other), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [one["run"] for one in found["runs"]] == [piped.name, other.name]
        assert found["runs"][0]["tokens"] == column(piped, "tokens")[-1]
        assert {"key", "values", "matters"} == found["differences"][0].keys()

    def test_one_page_and_one_plot(self, piped, other, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        page, plot = tmp_path / "page.html", tmp_path / "plot.svg"
        words = ["--html", str(page), "--plot", str(plot)]
        assert main(["report", str(piped), str(other), *words]) == 0
        text = page.read_text()
        assert text.startswith("<!doctype html>") and text.count('class="curve') > 8
        assert "parallel.pipeline_model_parallel_size" in text and "megatron-core" in text
        assert plot.read_text().count("<svg") == 1

    @pytest.mark.parametrize("option", ["--html", "--plot"])
    def test_a_file_that_cannot_be_written(self, piped, capsys, option):
        assert main(["report", str(piped), option, "/nowhere/a.svg"]) == 2
        assert f"{option} /nowhere/a.svg" in capsys.readouterr().err

    def test_a_run_without_steps_stands_beside_one_with_some(self, piped, tmp_path, capsys):
        (tmp_path / "new").mkdir()
        assert main(["report", str(piped), str(tmp_path / "new")]) == 0
        assert "new: no steps" in capsys.readouterr().out


def test_a_reader_that_leaves(piped):
    """`attnres-train report RUN | head -c 1`, the way a shell does it."""
    command = f"{sys.executable} -m attnres_train report {piped} --json | head -c 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "{" and done.stderr == ""
