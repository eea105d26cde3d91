"""Runs as one page of HTML that needs nothing else: no network, no file beside it.

It says so itself: its content security policy allows nothing to be loaded. What comes from a run
(names, values, texts) is escaped wherever it stands.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files

from attnres_train import __version__
from attnres_train.reports.chart import COLORS, Chart, dash, number
from attnres_train.reports.curves import curves_of, loss_curves, time_axis, token_axis
from attnres_train.reports.differences import differences
from attnres_train.reports.measures import Measures, by_corpus, measures
from attnres_train.reports.parts import configurations, environment, pictures, samples
from attnres_train.reports.reading import Run
from attnres_train.reports.summary import changed
from attnres_train.reports.table import HEADINGS, cells

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_MORE = {
    "grad_norm": ("Gradient norm", ""),
    "lr": ("Learning rate", ""),
    "tokens_per_second": ("Tokens per second", ""),
    "expert_violation": ("Most loaded expert, above the mean", ""),
    "expert_entropy": ("Evenness of the experts' load", ""),
    "wait_share": ("Share of the time spent waiting for peers", ""),
    "tflops": ("TFLOP/s", ""),
}
"""Keys of records that have a chart, of the runs that have them."""


def page(runs: Sequence[Run]) -> str:
    """The HTML of ``runs``, of which there is at least one."""
    labels = [run.label for run in runs]
    charts = _charts(runs)
    title = ", ".join(labels)
    # Nothing in a script element ends it but "</".
    data = json.dumps({c.key: c.data() for c in charts}, allow_nan=False).replace("<", "\\u003c")
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    sections = [
        ("Results", _results([measures(run) for run in runs])),
        ("Loss", _loss(charts[:2], labels)),
        ("Differences between the configurations", _differences(runs)),
        ("Changed while it ran", _changes(runs)),
        ("Depth attention and experts", pictures(runs)),
        ("Samples", samples(runs)),
        ("More curves", _grid(charts[2:], labels)),
        ("Environment", environment(runs)),
        ("Configurations", configurations(runs)),
    ]
    body = "\n".join(
        f'<section class="card"><h2>{name}</h2>\n{content}</section>'
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
<header><div><h1>{escape(title)}</h1><p class="pale">Training report, {made}</p></div>
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


def _file(name: str) -> str:
    return (files("attnres_train.reports") / name).read_text(encoding="utf-8")


def _charts(runs: Sequence[Run]) -> list[Chart]:
    """Loss against tokens and against time, then the others."""
    tokens, time = token_axis(runs), time_axis(runs)
    charts = [
        Chart(
            "loss-tokens",
            "Loss against tokens",
            "nats per token",
            tokens,
            loss_curves(runs, tokens),
        ),
        Chart("loss-time", "Loss against time", "nats per token", time, loss_curves(runs, time)),
    ]
    found = [label for run in runs for record in run.records for label in by_corpus(record)]
    for place, label in enumerate(dict.fromkeys(found)):
        curves = curves_of(runs, f"validation_loss/{label}", tokens)
        name = f"Validation loss of {label}"
        charts.append(Chart(f"corpus-{place}", name, "nats per token", tokens, curves))
    for key, (name, unit) in _MORE.items():
        if curves := curves_of(runs, key, tokens):
            charts.append(Chart(key.replace("_", "-"), name, unit, tokens, curves))
    return charts


def swatch(run: int) -> str:
    return (
        f'<svg class="swatch run-{run % COLORS}" viewBox="0 0 26 10" aria-hidden="true"><line '
        f'class="curve" x1="0" x2="26" y1="5" y2="5" stroke-dasharray="{dash(run)}"/></svg>'
    )


def scrolling(table: str, name: str) -> str:
    """A ``table`` that may be wider than the page, which then scrolls by itself, by keys too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{name}">{table}</div>'


def _results(found: Sequence[Measures]) -> str:
    """The table of measures; of several runs the best of what is compared stands out."""
    head = "".join(f'<th scope="col">{heading}</th>' for heading in (*HEADINGS, "state"))
    losses = [one.best_validation_loss for one in found if one.best_validation_loss is not None]
    rows = []
    for index, one in enumerate(found):
        name, *rest = cells(one)
        best = len(losses) > 1 and one.best_validation_loss == min(losses)
        columns = "".join(
            f"<td{' class=best' if best and heading == 'best validation' else ''}>{cell}</td>"
            for heading, cell in zip(HEADINGS[1:], rest, strict=True)
        )
        rows.append(
            f'<tr><th scope="row">{swatch(index)}{escape(name)}</th>{columns}'
            f"<td>{one.standing}</td></tr>"
        )
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    note = (
        "Losses in nats per token; loss: smoothed over steps; tokens/s: median over steps; time: "
        "spent in steps."
    )
    table = scrolling(f'<table class="numbers">{body}</table>', "Results")
    return f'{table}<p class="pale">{note}</p>'


def _loss(charts: Sequence[Chart], labels: Sequence[str]) -> str:
    if not any(chart.curves for chart in charts):
        return "<p>No steps yet.</p>"
    most = max(curve.steps_per_point for chart in charts for curve in chart.curves)
    thinned = f"up to {most:,} steps are one point, so that it runs" if most > 1 else "it runs"
    note = (
        '<p class="pale">Line: smoothed training loss. Dots: validation. Shade: the steps\' own '
        f"losses; {thinned} from the least to the greatest of them, cut off where it leaves the "
        "range of the lines.</p>"
    )
    return _grid(charts, labels) + note


def _grid(charts: Sequence[Chart], labels: Sequence[str]) -> str:
    figures = "\n".join(_figure(chart, labels) for chart in charts)
    return f'<div class="grid">\n{figures}\n</div>' if charts else ""


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


def _differences(runs: Sequence[Run]) -> str:
    if len(runs) < 2:
        return ""
    found = differences(runs)
    if not found:
        return "<p>None.</p>"
    head = "".join(
        f'<th scope="col">{swatch(index)}{escape(run.label)}</th>' for index, run in enumerate(runs)
    )
    parts = []
    for matters, title in ((True, ""), (False, "Without bearing on what is learnt")):
        rows = "".join(
            f'<tr><th scope="row">{escape(one.key)}</th>'
            + "".join(f"<td>{escape(value) or 'none'}</td>" for value in one.values)
            + "</tr>"
            for one in found
            if one.matters == matters
        )
        table = (
            f'<table class="keys"><thead><tr><th scope="col">key</th>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table>"
        )
        heading = f"<h3>{title}</h3>" if title else ""
        if rows:
            parts.append(heading + scrolling(table, title or "Differences"))
    return "".join(parts)


def _changes(runs: Sequence[Run]) -> str:
    return "".join(_changes_of(run) for run in runs)


def _changes_of(run: Run) -> str:
    lines = "".join(f"<li>{escape(line)}</li>" for line in changed(run.folder))
    return f"<h3>{escape(run.label)}</h3><ul>{lines}</ul>" if lines else ""
