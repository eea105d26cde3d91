"""What a report says of made-up records whose differences are known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from attnres_train.study.analysis import Analysis
from attnres_train.study.plot import draw
from attnres_train.study.power_law import PFLOPS_DAY, PowerLaw
from attnres_train.study.record import as_json, read_record
from attnres_train.study.scaling import scalings
from attnres_train.study.text import as_text
from tests.study.helpers import synthetic

AXES = {"kind": ["standard", "block"], "lr": ["1", "2", "4"], "seed": ["1", "2", "3"]}
BEST = {"standard": "2", "block": "4"}


def losses(labels, tokens):
    """A kind's best rate costs nothing, others 0.1; block gains 0.03 at 300 tokens, 0.01 less or
    more by seed; the seed itself shifts both."""
    seed = int(labels["seed"])
    loss = 3 + 100 / tokens + 0.2 * seed + 0.1 * (labels["lr"] != BEST[labels["kind"]])
    return loss - (labels["kind"] == "block") * (0.03 + 0.01 * (seed - 2)) * tokens / 300


@pytest.fixture
def record():
    return synthetic(losses, AXES, pair="seed", tune="lr")


def test_each_kind_at_its_best(record):
    (group,) = Analysis(record).groups
    assert {kind: cell.tuned for kind, cell in group.best.items()} == BEST
    assert group.at_edge == {"block"}
    (comparison,) = group.tuned
    assert comparison.difference.each == pytest.approx((-0.02, -0.03, -0.04))
    assert comparison.difference.student == pytest.approx((-0.0548, -0.0052), abs=1e-4)
    same = {one.tuned: one.difference.mean for one in group.alike}
    assert same == pytest.approx({"1": -0.03, "2": 0.07, "4": -0.13})


def test_the_course_over_tokens(record):
    analysis = Analysis(record)
    course = analysis.course(analysis.groups[0], analysis.groups[0].tuned[0])
    assert [(tokens, round(one.mean, 6)) for tokens, one in course] == [
        (100, -0.01),
        (200, -0.02),
        (300, -0.03),
    ]


def test_a_rate_that_diverges_is_not_the_best():
    def diverging(labels, tokens):
        if labels["lr"] == "4" and labels["seed"] == "3" and tokens == 300:
            return None
        return losses(labels, tokens) - 0.5 * (labels["lr"] == "4")

    analysis = Analysis(synthetic(diverging, AXES, pair="seed", tune="lr"))
    (group,) = analysis.groups
    assert group.best["block"].tuned != "4"
    cells = {(cell.kind, cell.tuned): cell for cell in group.cells}
    assert len(cells["block", "4"].values) == 2
    assert "missing or diverged" in as_text(analysis)


def test_best_of_a_curve_that_rises_again():
    def rising(labels, tokens):
        return 3.0 if tokens == 200 else 4.0

    axes = {"kind": ["standard", "block"]}
    values = {
        take: Analysis(synthetic(rising, axes, take=take)).groups[0].cells[0].mean
        for take in ("best", "final")
    }
    assert values == {"best": 3.0, "final": 4.0}


def test_without_pairs_there_is_no_interval():
    axes = {"kind": ["standard", "block"]}
    analysis = Analysis(synthetic(lambda labels, tokens: 3.0, axes))
    assert analysis.groups[0].tuned[0].difference.student is None
    assert "block" in as_text(analysis)


def test_runs_that_are_missing(record):
    record["runs"] = [run for run in record["runs"] if run["labels"]["seed"] != "3"]
    record["missing"] = ["a", "b"]
    analysis = Analysis(record)
    assert analysis.groups[0].tuned[0].pairs == ("1", "2")
    assert "18 runs" not in (text := as_text(analysis)) and "of 14 runs have ended" in text
    record["runs"] = [run for run in record["runs"] if run["labels"]["kind"] == "block"]
    assert Analysis(record).groups[0].tuned == []


def test_false_positives_of_tuned_kinds():
    """Kinds that are alike, each at the best of three rates by the mean of five seeds: to choose
    for both on the same losses does not make a difference of none. 300 studies, 5 % wrong."""
    axes = {"kind": ["a", "b"], "lr": ["1", "2", "3"], "seed": list("12345")}
    rng, wrong, studies = np.random.default_rng(0), 0, 300
    for _ in range(studies):
        seeds = dict(zip(axes["seed"], rng.normal(0, 0.05, 5), strict=True))

        def alike(labels, tokens, seeds=seeds):
            return 3 + seeds[labels["seed"]] + rng.normal(0, 0.01)

        record = synthetic(alike, axes, pair="seed", tune="lr")
        (comparison,) = Analysis(record).groups[0].tuned
        wrong += 0 not in comparison.difference.student
    assert wrong / studies < 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)


def test_sizes_and_power_laws():
    laws = {"standard": PowerLaw(1.891, 0.057), "block": PowerLaw(1.870, 0.058)}
    compute = {"s": 0.6, "m": 1.5, "l": 3.0, "xl": 5.6}
    axes = {"size": list(compute), "kind": list(laws), "seed": ["1", "2"]}
    record = synthetic(
        lambda labels, tokens: laws[labels["kind"]].loss(compute[labels["size"]]),
        axes,
        lambda labels: compute[labels["size"]] * PFLOPS_DAY / 300,
        pair="seed",
        fit="size",
    )
    analysis = Analysis(record)
    assert [group.labels["size"] for group in analysis.groups] == list(compute)
    (scaling,) = scalings(analysis)
    assert scaling.fits["block"].law.exponent == pytest.approx(0.058)
    multiplier, interval = scaling.multipliers["block"]
    assert multiplier == pytest.approx(1.25, abs=0.01) and interval == pytest.approx(
        (multiplier, multiplier)
    )
    assert "1.25" in as_text(analysis)
    record["report"]["fit_floor"] = True
    record["axes"]["size"].remove("xl")
    assert "needs 4 points" in scalings(Analysis(record))[0].problem


def test_a_record_alone_redraws_everything(record, tmp_path):
    path = tmp_path / "record.json"
    path.write_text(as_json(record))
    again = read_record(path)
    assert again == json.loads(json.dumps(record))
    assert as_text(Analysis(again)) == as_text(Analysis(record))
    draw(Analysis(again), tmp_path / "picture.svg")
    picture = (tmp_path / "picture.svg").read_text()
    assert picture.startswith("<?xml") and picture.count('id="axes_') == 2
