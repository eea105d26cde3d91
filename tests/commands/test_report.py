"""The summary that a run ends with."""

from __future__ import annotations

import re
import shutil

import pytest

from attnres_train.__main__ import main
from attnres_train.commands.report import report
from attnres_train.errors import UserError
from attnres_train.planning.build import build_plan
from tests.tiny import STEPS, column, grid


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
    sent = STEPS * 2 * units.exact * 4 * (2 * 32 * 32 * 4)
    full = sent * units.naive / units.exact
    assert rows["sent"] == (
        f"{sent / 1e6:.1f} MB between stages; the full history on every hop would have been "
        f"{full / 1e6:.1f} MB ({units.naive / units.exact:.2f}x)"
    )


def test_where_things_lie(rows, piped):
    assert rows["checkpoint"] == str(piped / "checkpoints" / f"step_{STEPS:08d}")
    assert rows["loss plot"] == str(piped / "loss.png")


def test_a_config_stands_for_its_run(tiny, rows, piped, capsys):
    assert main(["report", str(tiny.path), f"run.name={piped.name}"]) == 0
    assert f"{piped}: step {STEPS} of {STEPS}, finished\n" in capsys.readouterr().out


def test_a_run_of_before_is_told_alike(piped, tmp_path, capsys):
    """One whose config has a key that is no more."""
    assert report(str(piped)) == 0
    now = capsys.readouterr().out
    old = shutil.copytree(piped, tmp_path / piped.name)
    config = (old / "config.yaml").read_text()
    aged = config.replace("  decay_end_iter: null\n  wsd_decay_iters: null\n", "  decay_iters: 9\n")
    (old / "config.yaml").write_text(aged)
    assert aged != config and report(str(old)) == 0
    assert capsys.readouterr().out.replace(str(old), str(piped)) == now


def test_one_stage_sends_nothing(tiny, capsys):
    run = tiny.train("whole-1x1", *grid(1, 1))
    assert report(str(run)) == 0
    assert "nothing between stages" in capsys.readouterr().out


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        report(str(tmp_path))


@pytest.mark.parametrize("more", ["runs/other", "run.name=x"])
def test_nothing_on_the_line_is_passed_over(piped, capsys, more):
    assert main(["report", str(piped), more]) == 2
    assert more in capsys.readouterr().err
