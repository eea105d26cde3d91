"""A report as one page of HTML that needs nothing else: no network, no file beside it. It says so
itself: its content security policy allows nothing to be loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path

from attnres_train import __version__
from attnres_train.errors import UserError
from attnres_train.reports.chart import COLORS, Chart, dash, number

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def document(
    title: str, told: str, sections: Sequence[tuple[str, str]], charts: Sequence[Chart]
) -> str:
    """The page called ``title``, ``told`` what it is. ``sections`` are (heading, HTML), left out
    where that is empty; ``charts`` are all that stand in them."""
    # Nothing in a script element ends it but "</".
    data = json.dumps({c.key: c.data() for c in charts}, allow_nan=False).replace("<", "\\u003c")
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    body = "\n".join(
        f'<section class="card"><h2>{escape(name)}</h2>\n{content}</section>'
        for name, content in sections
        if content
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<style>
{_file("page.css")}</style>
</head>
<body>
<header><div><h1>{escape(title)}</h1><p class="pale">{escape(told)}, {made}</p></div>
<button id="theme" type="button" hidden>Theme: auto</button></header>
<main>
{body}
</main>
<footer>Made by attnres-train {__version__}. This file is all of it: nothing is loaded.</footer>
<script type="application/json" id="data">{data}</script>
<script>
{_file("page.js")}</script>
</body>
</html>
"""


def write_document(path: Path, text: str) -> None:
    """Raises UserError where that cannot be."""
    try:
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"--html {path}: {error.strerror}") from error


def _file(name: str) -> str:
    return (files("attnres_train.reports") / name).read_text(encoding="utf-8")


def swatch(run: int) -> str:
    return (
        f'<svg class="swatch run-{run % COLORS}" viewBox="0 0 26 10" aria-hidden="true"><line '
        f'class="curve" x1="0" x2="26" y1="5" y2="5" stroke-dasharray="{dash(run)}"/></svg>'
    )


def scrolling(table: str, name: str) -> str:
    """A ``table`` that may be wider than the page, which then scrolls by itself, by keys too."""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">{table}</div>'
    )


def figures(charts: Sequence[Chart], labels: Sequence[str]) -> str:
    """Each of ``charts`` with its legend; ``labels`` are the runs' names."""
    drawn = "\n".join(_figure(chart, labels) for chart in charts)
    return f'<div class="grid">\n{drawn}\n</div>' if charts else ""


def _figure(chart: Chart, labels: Sequence[str]) -> str:
    unit = f" ({chart.unit})" if chart.unit else ""
    items = "".join(
        f'<li><button type="button" value="{curve.run}" aria-pressed="true" disabled>'
        f"{swatch(curve.run)}{escape(labels[curve.run])}</button>"
        f'<span class="value" data-of="{curve.run}">{number(curve.points[-1].y)}</span></li>'
        for curve in chart.curves
    )
    return (
        f"<figure><h3>{escape(chart.name)}{unit}</h3>\n{chart.svg(labels)}\n"
        f'<ul class="legend">{items}</ul>'
        '<figcaption class="where" aria-live="polite">at the end</figcaption></figure>'
    )
