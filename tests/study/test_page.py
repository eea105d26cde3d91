"""The page of a study: what the report says, whole in itself, safe, from the record alone."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest

from attnres_train.study.analysis import Analysis
from attnres_train.study.page import page
from attnres_train.study.text import as_text
from tests.reports.elements import Elements
from tests.study.helpers import synthetic

EVIL = "<script>alert(1)</script>&\"'"
EFFECT = {"standard": 0.0, EVIL: -0.05, "static": 0.01}


def loss(labels: dict[str, str], tokens: int) -> float:
    """Of seeds that are 0.3 apart, which pairs cancel but for some hundredths."""
    seed = int(labels["seed"])
    noise = 0.01 * ((7 * seed + len(labels["kind"])) % 5)
    return 5 + 0.3 * seed + EFFECT[labels["kind"]] - tokens / 300 + noise


AXES = {"kind": list(EFFECT), "seed": ["1", "2", "3"]}


@pytest.fixture
def analysis() -> Analysis:
    record = synthetic(loss, AXES, pair="seed", baseline="standard")
    return Analysis(json.loads(json.dumps(record)))


def data_of(text: str) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found.group(1))


def test_every_number_of_the_report_is_there(analysis):
    told = " ".join(Elements(page(analysis)).texts)
    for row in as_text(analysis).splitlines():
        for number in re.findall(r"[+-]?\d+\.\d{4}", row):
            assert number in told, row
    for words in ("difference from standard", "by tokens", "cost here", "95 % (t)"):
        assert words in told


def test_nothing_of_a_record_becomes_markup_and_nothing_is_loaded(analysis):
    analysis.record["study"] = EVIL
    text = page(analysis)
    elements = Elements(text)
    assert len(elements.named("script")) == 2
    assert not any(key.startswith("on") for _, attributes in elements.found for key in attributes)
    assert any(EVIL in told for told in elements.texts)
    (policy,) = [m for m in elements.named("meta") if "http-equiv" in m]
    assert policy["content"].startswith("default-src 'none'")
    assert not re.search(r"https?://|@import|url\((?!#)|<link", text)
    assert all(region["aria-label"] for region in elements.named("div") if "role" in region)


def test_curves_are_means_of_the_seeds_with_each_seed_thin(analysis):
    text = page(analysis)
    chart = data_of(text)["loss-0"]
    assert [curve["run"] for curve in chart["curves"]] == [0, 1, 2]
    for curve, kind in zip(chart["curves"], EFFECT, strict=True):
        for (x, mean, low, high), tokens in zip(curve["points"], (100, 200, 300), strict=True):
            each = [loss({"kind": kind, "seed": str(seed)}, tokens) for seed in (1, 2, 3)]
            assert x == tokens
            assert mean == pytest.approx(sum(each) / 3, rel=1e-5)
            assert (low, high) == (pytest.approx(min(each)), pytest.approx(max(each)))
    lines = [line["class"] for line in Elements(text).named("polyline")]
    for kind in range(3):
        assert lines.count(f"curve strand run-{kind}") == 3


def test_differences_are_those_of_the_pairs_with_their_interval(analysis):
    text = page(analysis)
    chart = data_of(text)["difference-0"]
    assert [curve["run"] for curve in chart["curves"]] == [1, 2]
    (group,) = analysis.groups
    for curve, comparison in zip(chart["curves"], group.tuned, strict=True):
        found = analysis.course(group, comparison)
        for (x, mean, low, high), (tokens, one) in zip(curve["points"], found, strict=True):
            assert one.student is not None
            assert (x, mean) == (tokens, pytest.approx(one.mean, rel=1e-5))
            assert (low, high) == pytest.approx(tuple(one.student), rel=1e-5)
    assert 'class="grid zero"' in text


def test_laws_through_sizes_are_drawn_over_the_logarithm_of_compute():
    flops = {"small": 1e9, "middle": 4e9, "large": 1.6e10}

    def law(labels: dict[str, str], tokens: int) -> float:
        scale = {"standard": 2.0, "block": 1.96}[labels["kind"]]
        return scale * (300 * flops[labels["size"]] / 8.64e19) ** -0.05

    axes = {"kind": ["standard", "block"], "size": list(flops)}
    record = synthetic(law, axes, lambda labels: flops[labels["size"]], fit="size")
    text = page(Analysis(record))
    chart = data_of(text)["law-0"]
    assert chart["log"] and len(chart["curves"]) == 2
    for curve, scale in zip(chart["curves"], (2.0, 1.96), strict=True):
        assert len(curve["marks"]) == 3
        assert curve["marks"][0][0] == pytest.approx(math.log10(300e9 / 8.64e19), rel=1e-5)
        for x, y, *_ in curve["points"]:
            assert y == pytest.approx(scale * 10 ** (-0.05 * x), rel=1e-4)
    told = " ".join(Elements(text).texts)
    assert "compute that standard needs" in told and "0.0500" in told
    assert "size middle" in told  # a section for each size


@pytest.mark.parametrize("pairs", [1, 2])
def test_few_pairs_and_runs_that_diverged(pairs):
    def some(labels: dict[str, str], tokens: int) -> float | None:
        return None if labels["kind"] == "static" and tokens == 300 else loss(labels, tokens)

    axes = AXES | {"seed": [str(seed + 1) for seed in range(pairs)]}
    text = page(Analysis(synthetic(some, axes, pair="seed", baseline="standard")))
    Elements(text)
    assert [curve["run"] for curve in data_of(text)["loss-0"]["curves"]] == [0, 1]


def test_a_study_without_axes_to_compare_makes_a_page():
    record = synthetic(lambda labels, tokens: 3.0, {"lr": ["1", "2"]}, compare=None)
    chart = data_of(page(Analysis(record)))
    assert chart["loss-0"]["curves"] and not any(key.startswith("difference") for key in chart)
