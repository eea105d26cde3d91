"""From a study file to runs: axes, order, what may be written how, and what is told of errors."""

from __future__ import annotations

import pytest

from attnres_train.config import ConfigError
from attnres_train.study.study_file import load_study
from tests.study.helpers import STUDY, write_study


def error_of(tmp_path, *replaced: tuple[str, str]) -> str:
    text = STUDY
    for old, new in replaced:
        assert old in text
        text = text.replace(old, new)
    with pytest.raises(ConfigError) as error:
        load_study(write_study(tmp_path, text))
    return str(error.value)


def test_runs_of_a_study(tmp_path):
    study = load_study(write_study(tmp_path))
    assert len(study.runs) == 2 * 2 * 2
    # All of one seed before the next.
    assert [run.config.run.seed for run in study.runs] == [1] * 4 + [2] * 4
    last = study.runs[-1]
    assert last.name == "kind=static,lr=0.01,seed=2"
    assert last.labels == {"kind": "static", "lr": "0.01", "seed": "2"}
    residual = last.config.model.residual
    assert (residual.kind, residual.scores, residual.block_size) == ("block", "bias", 3)
    assert last.config.optimizer.lr == 0.01 and last.config.train.train_iters == 4
    assert last.config.run.dir == f"{tmp_path}/studies/small/runs"
    assert study.folder == tmp_path / "studies" / "small"
    assert study.runs[0].config.model.residual.kind == "standard"


def test_overrides_and_extends(tmp_path):
    path = write_study(tmp_path)
    child = tmp_path / "child.yaml"
    child.write_text("extends: study.yaml\nstudy: {name: child}\nset: {optimizer.lr: 1}\n")
    study = load_study(child, ["axes.1.values=[3e-3]", "set.train.train_iters=7"])
    assert study.settings.study.name == "child" and len(study.runs) == 4
    assert study.runs[0].config.optimizer.lr == 3e-3
    assert study.runs[0].config.train.train_iters == 7
    assert len(load_study(path).runs) == 8


def test_points_may_begin_with_files(tmp_path):
    (tmp_path / "wide.yaml").write_text("model: {hidden_size: 64}\ntrain: {train_iters: 9}\n")
    size = "  - {{name: size, values: {{wide: {{extends: wide.yaml}}, small: {{}}}}}}\n"
    path = write_study(tmp_path, STUDY.replace("report:", size + "report:"))
    runs = load_study(path).runs
    widths = {run.labels["size"]: run.config.model.hidden_size for run in runs}
    assert widths == {"wide": 64, "small": 32}
    assert {run.config.train.train_iters for run in runs} == {
        4
    }  # what all runs change goes over it


def test_unknown_keys_of_the_study(tmp_path):
    told = error_of(tmp_path, ("name: small", "name: small, dirr: x"))
    assert "study.dirr (" in told and f"{tmp_path}/study.yaml:2" in told
    assert "unknown key; did you mean study.dir?" in told
    assert "axes.1.kay" in error_of(tmp_path, ("key: optimizer.lr", "kay: optimizer.lr"))
    told = error_of(tmp_path, ("set:", "train: {{train_iters: 3}}\nset:"))
    assert "keys of a run's configuration stand in `set` or an axis" in told
    assert "set.train_iters" not in told


def test_unknown_keys_of_the_runs(tmp_path):
    told = error_of(tmp_path, ("key: optimizer.lr", "key: optimizer.learning_rate"))
    assert f"optimizer.learning_rate ({tmp_path}/study.yaml:" in told
    assert "did you mean optimizer.lr" in told
    told = error_of(tmp_path, ("train.train_iters: 4", "train.train_iters: 0"))
    assert "run kind=standard,lr=0.005,seed=1: train.train_iters" in told and "study.yaml:5" in told


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("pair: seed", "pair: sed", "report.pair"),
        ("tune: lr", "tune: seed", "each axis has one part"),
        ("baseline: standard", "baseline: full", "kind has standard, static"),
        ("name: lr", "name: kind", "axes.1.name"),
        ("key: optimizer.lr, ", "", "a list goes with `key`"),
        ("[5e-3, 1e-2]", "[]", "axes.1.values"),
        ("[5e-3, 1e-2]", "['a/b', 1e-2]", "cannot stand in the name of a run"),
        ("name: small", "name: ../up", "study.name"),
        ("base: tiny.yaml", "base: gone.yaml", "base ("),
        ("train.train_iters: 4", "run.name: mine", "a study gives its runs names and places"),
        ("baseline: standard", "confidence: 95", "report.confidence"),
    ],
)
def test_mistakes(tmp_path, old, new, expected):
    told = error_of(tmp_path, (old, new))
    assert expected in told and "study.yaml" in told


def test_pairs_have_one_seed(tmp_path):
    told = error_of(
        tmp_path,
        ("kind: block, scores: bias}}}}", "kind: block, scores: bias}}, run.seed: 9}}"),
        ("key: run.seed, values: [1, 2]", "values: {{'1': {{}}, '2': {{}}}}"),
    )
    assert "run kind=static,lr=0.005,seed=1: run.seed is 9, but 1234 in kind=standard" in told
