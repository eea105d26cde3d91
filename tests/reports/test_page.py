"""The page: whole in itself, safe, and not growing with the steps."""

from __future__ import annotations

import json
import re

import pytest

from attnres_train.observe import pictures as observations
from attnres_train.reports.document import _file
from attnres_train.reports.page import page
from attnres_train.reports.reading import read_runs
from tests.reports.elements import Elements
from tests.reports.folders import falling, make_run

EVIL = "<script>alert(1)</script>&\"'"


@pytest.fixture
def two(tmp_path):
    evil = make_run(tmp_path / "a" / EVIL.replace("/", "-"), falling(60))
    sample = {"step": 5, "prompt": EVIL, "text": EVIL}
    (evil / "samples.jsonl").write_text(json.dumps(sample) + '\n{"step": 6, "pro')
    other = make_run(tmp_path / "b", falling(40, 6.0), "optimizer: {lr: 0.7}\n")
    return read_runs([evil, other])


def test_nothing_of_a_run_becomes_markup(two):
    text = page(two)
    elements = Elements(text)
    assert len(elements.named("script")) == 2
    assert not any(key.startswith("on") for _, attributes in elements.found for key in attributes)
    assert any(EVIL in told for told in elements.texts)  # the sample, as it is
    assert json.loads(re.search(r'id="data">(.*?)</script>', text, re.S).group(1))


def test_nothing_is_loaded(two):
    text = page(two)
    (policy,) = [m for m in Elements(text).named("meta") if "http-equiv" in m]
    assert policy["content"].startswith("default-src 'none'")
    assert not re.search(r"https?://|@import|url\((?!#)|<link", text)


def test_what_a_reader_without_eyes_or_script_gets(two):
    elements = Elements(page(two))
    charts = [svg for svg in elements.named("svg") if "data-chart" in svg]
    assert len(charts) >= 4
    assert all("ends at" in chart["aria-label"] and chart["tabindex"] == "0" for chart in charts)
    assert all(region["aria-label"] for region in elements.named("div") if "role" in region)
    assert elements.named("html")[0]["lang"] == "en"
    assert {"optimizer.lr", "0.7"} <= set(elements.texts)


def test_a_page_does_not_grow_with_the_steps(tmp_path):
    short = page(read_runs([make_run(tmp_path / "short", falling(600))]))
    long = page(read_runs([make_run(tmp_path / "long", falling(30_000, 400.0))]))
    assert len(long) < 1.5 * len(short) < 300_000
    assert "up to 100 steps are one point" in long and "one point" in short


def test_runs_without_anything_make_a_page(tmp_path):
    (tmp_path / "empty").mkdir()
    Elements(page(read_runs([tmp_path / "empty"])))


def test_pictures_come_with_words(two, monkeypatch):
    figures = pytest.importorskip("matplotlib.figure")
    monkeypatch.setattr(
        observations, "pictures", lambda folder: {"expert_load": figures.Figure((2, 1))}
    )
    images = Elements(page(two)).named("img")
    assert len(images) == 2
    assert all(i["src"].startswith("data:image/png;base64,") and "Load" in i["alt"] for i in images)


def themes() -> dict[str, dict[str, str]]:
    """The colors of the style, light and dark."""
    blocks = re.findall(r"(:root[^{]*)\{([^{}]*)\}", _file("page.css"))
    colors = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", body)) for _, body in blocks]
    assert len(colors) == 3 and colors[1] == colors[2]
    return {"light": colors[0], "dark": colors[1]}


def contrast(one: str, other: str) -> float:
    """WCAG 2.1: (L1 + 0.05) / (L2 + 0.05) of relative luminances."""

    def luminance(color: str) -> float:
        channels = [int(color[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast(theme):
    colors = themes()[theme]
    for name in ("text", "pale", "accent"):
        for ground in ("sheet", "card", "hover"):
            assert contrast(colors[name], colors[ground]) >= 4.5, (name, ground)
    for run in range(8):
        assert contrast(colors[f"run-{run}"], colors["card"]) >= 3, run
