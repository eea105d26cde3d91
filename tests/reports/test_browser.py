"""Pages of runs and of a study in a real browser, where there is one: they run, fit a phone, follow
the theme."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from attnres_train.reports.page import page
from attnres_train.reports.reading import read_runs
from attnres_train.study.analysis import Analysis
from attnres_train.study.page import page as study_page
from attnres_train.study.record import read_record
from tests.reports.folders import falling, make_run

STUDY = Path(__file__).parents[2] / "docs" / "results" / "gain_small.json"

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(not CHROMIUM, reason="no chromium here (Debian: apt-get install chromium)"),
]
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--virtual-time-budget=3000",
]
# Runs at the end of the page, and leaves what it finds where --dump-dom shows it.
PROBE = """
<script>
const found = { errors: window.errors, width: document.documentElement.scrollWidth,
  inner: window.innerWidth, dark: getComputedStyle(document.body).backgroundColor };
const svg = document.querySelector("svg[data-chart]"), figure = svg.closest("figure");
const values = () => [...figure.querySelectorAll(".value")].map((v) => v.textContent);
found.rest = values();
const box = svg.getBoundingClientRect();
svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2 }));
found.hovered = values();
found.where = figure.querySelector(".where").textContent;
found.guide = svg.querySelector(".guide").getAttribute("visibility");
svg.dispatchEvent(new PointerEvent("pointerleave"));
found.left = values();
svg.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
found.keyed = figure.querySelector(".where").textContent;
figure.querySelector(".legend button").click();
found.hidden = getComputedStyle(svg.querySelector("[data-run='0']")).display;
found.others = getComputedStyle(svg.querySelector("[data-run='1']")).display;
const theme = document.getElementById("theme");
found.themes = [1, 2, 3].map(() => { theme.click();
  return [theme.textContent, getComputedStyle(document.body).backgroundColor]; });
const wider = (element) => element.scrollWidth > element.clientWidth;
found.scrolls = [...document.querySelectorAll(".scroll")].some(wider);
found.loaded = performance.getEntriesByType("resource").length;
// A page in a frame leaves it in the page around.
const around = window.parent.document;
around.body.append(Object.assign(around.createElement("pre"),
  { id: "found", textContent: JSON.stringify(found) }));
</script>
"""
ERRORS = "<script>window.errors = []; window.onerror = (m) => { window.errors.push(m); };</script>"


def of_runs(folder: Path) -> str:
    runs = [
        make_run(folder / "a-run-with-a-long-name" / f"<b>{n}", falling(60 + 20 * n, 5.0 + n))
        for n in range(3)
    ]
    return page(read_runs(runs))


def of_a_study(folder: Path) -> str:
    return study_page(Analysis(read_record(STUDY)))


# Of each, what stands under the pointer in the middle of its first chart.
PAGES = {of_runs: [4.6, 5.6, 6.6], of_a_study: [4.87, 4.80, 4.79]}


@pytest.fixture(scope="module", params=PAGES, ids=lambda make: make.__name__)
def made(request) -> Callable[[Path], str]:
    return request.param


@pytest.fixture(scope="module")
def file(tmp_path_factory, made) -> Path:
    folder = tmp_path_factory.mktemp("page")
    text = made(folder)
    text = text.replace("<head>", f"<head>{ERRORS}").replace("</body>", f"{PROBE}</body>")
    (folder / "page.html").write_text(text)
    return folder / "page.html"


def looked_at(file: Path, tmp_path: Path, size: str, *more: str) -> dict[str, Any]:
    """What `PROBE` finds in a window of ``size``."""
    command = [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path}", f"--window-size={size}", *more]
    done = subprocess.run(
        [*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=600
    )
    match = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert match, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(unescape(match.group(1)))


def test_values_under_the_pointer_and_by_keys(file, made, tmp_path):
    found = looked_at(file, tmp_path, "1280,900")
    assert found["errors"] == [] and found["loaded"] == 0
    assert found["hovered"] != found["rest"] == found["left"] and found["guide"] == "visible"
    assert re.fullmatch(r"at [\d.,]+ thousands tokens|at [\d.,]+ tokens", found["where"])
    assert found["keyed"] not in ("at the end", found["where"])
    # At half of the tokens, or one point beside.
    assert [float(text.split()[0]) for text in found["hovered"]] == pytest.approx(
        PAGES[made], abs=0.2
    )
    assert found["hidden"] == "none" != found["others"]


def test_a_phone_scrolls_tables_and_never_the_page(file, tmp_path):
    """In a frame of its width: a window is never narrower than 500 pixels."""
    frame = tmp_path / "phone.html"
    inner = escape(file.read_text())
    frame.write_text(f'<body><iframe width="360" height="800" frameborder="0" srcdoc="{inner}">')
    found = looked_at(frame, tmp_path / "profile", "800,900")
    assert found["inner"] == 360 and found["width"] <= 360 and found["scrolls"]


def test_light_and_dark(file, tmp_path):
    light, dark = "rgb(246, 247, 249)", "rgb(17, 21, 27)"
    found = looked_at(file, tmp_path, "1280,900", "--blink-settings=preferredColorScheme=1")
    assert found["dark"] == light
    assert found["themes"] == [
        ["Theme: light", light],
        ["Theme: dark", dark],
        ["Theme: auto", light],
    ]
    found = looked_at(file, tmp_path, "1280,900", "--blink-settings=preferredColorScheme=0")
    assert found["dark"] == dark and found["themes"][0] == ["Theme: light", light]


def test_without_script_the_curves_and_values_are_there(file, made, tmp_path):
    bare = tmp_path / "bare.html"
    bare.write_text(re.sub(r"<script.*?</script>", "", file.read_text(), flags=re.S))
    picture = tmp_path / "bare.png"
    command = [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=800,900"]
    subprocess.run([*command, f"--screenshot={picture}", bare.as_uri()], check=True, timeout=600)
    assert picture.stat().st_size > 20_000
    assert bare.read_text().count("<polyline") >= (12 if made is of_runs else 5)
