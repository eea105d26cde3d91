"""Every figure that docs/results.md, and README.md of it, quote is a record's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from attnres_train.commands.report import as_summary
from attnres_train.observe.observed import read_observation
from attnres_train.reports.reading import read_runs
from attnres_train.study.analysis import Analysis
from attnres_train.study.record import read_record
from attnres_train.study.text import as_text

DOCS = Path(__file__).parents[2] / "docs"
RECORDS = DOCS / "results"
STUDIES = ("gain_small",)
RUN = "quickstart"
# Numbers with decimals, but those of papers' addresses and of versions.
FIGURE = re.compile(r"(?<![\w./])[-+]?\d[\d,]*\.\d+(?![\w./]*\d)")
BLOCK = re.compile(r"^```text\n(.*?)^```", re.M | re.S)


@pytest.fixture(scope="module")
def reports() -> dict[str, str]:
    studies = {
        name: as_text(Analysis(read_record(RECORDS / f"{name}.json"))) + "\n" for name in STUDIES
    }
    (run,) = read_runs([RECORDS / RUN])
    return studies | {RUN: as_summary(run).replace(str(DOCS.parent) + "/", "") + "\n"}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """What the quickstart's model has written, with the prompts."""
    lines = (RECORDS / RUN / "generated.jsonl").read_text(encoding="utf-8").splitlines()
    written = [json.loads(line) for line in lines]
    return [one["prompt"] + one["text"] for one in written]


def figures(text: str) -> list[str]:
    return FIGURE.findall(text)


def is_among(figure: str, known: list[float]) -> bool:
    """Whether one of ``known`` is ``figure`` when rounded as that is. Without a sign it stands for
    both ("0.05 below")."""
    told = float(figure.replace(",", ""))
    if figure[0] not in "+-":
        known = [abs(one) for one in known]
    half = 0.5 * 10.0 ** -len(figure.partition(".")[2])
    return any(abs(told - one) <= half * (1 + 1e-9) for one in known)


@pytest.fixture(scope="module")
def known(reports) -> list[float]:
    weights = read_observation(RECORDS / RUN, 120)["depth_weight_mean"]
    told = [float(f.replace(",", "")) for text in reports.values() for f in figures(text)]
    return told + weights[~np.isnan(weights)].tolist()


def sentences(text: str) -> list[str]:
    """Of the prose, without what stands in blocks and links."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    prose = re.sub(r"\]\([^)]*\)", "]", prose)
    return re.split(r"(?<=[.:;])\s+|\n\n|\n- |\n\|", prose)


def wrong(text: str, known: list[float]) -> list[str]:
    """Figures that no record has; a sentence that names benchmarks.md quotes that page."""
    benchmarks = [float(f.replace(",", "")) for f in figures((DOCS / "benchmarks.md").read_text())]
    return [
        figure
        for sentence in sentences(text)
        for figure in figures(sentence)
        if not is_among(figure, benchmarks if "benchmarks.md" in sentence else known)
    ]


def test_every_figure_is_a_records(known):
    text = (DOCS / "results.md").read_text()
    assert len(figures(" ".join(sentences(text)))) > 10
    assert wrong(text, known) == []


def test_readme_quotes_no_other(known):
    readme = (DOCS.parent / "README.md").read_text()
    (section,) = re.findall(r"^## Does it train better\?\n(.*?)^## ", readme, re.M | re.S)
    assert figures(section)
    assert wrong(section, known) == []


def test_what_reads_most_is_as_told():
    """MLPs take most from the embedding, and attention, from layer 6 on, from the newest block."""
    weights = read_observation(RECORDS / RUN, 120)["depth_weight_mean"][:-1]
    newest = [np.flatnonzero(~np.isnan(row))[-1] for row in weights]
    most = np.nanargmax(weights, axis=1)
    assert not most[1::2].any()
    assert most[10::2].tolist() == newest[10::2]


def test_tables_are_the_reports_own(reports, texts):
    blocks = BLOCK.findall((DOCS / "results.md").read_text())
    assert blocks
    for block in blocks:
        assert any(block in text for text in reports.values()) or any(
            text.rstrip() == block.rstrip() for text in texts
        ), block


def test_a_figure_that_no_record_has_is_found(known):
    assert wrong("The loss is 99.1234 lower, or -0.99991.", known) == ["99.1234", "-0.99991"]
    assert is_among("-0.07", [-0.0749])
    assert not is_among("-0.07", [0.07, -0.0751])
