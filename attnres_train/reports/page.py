"""Runs as one page of HTML (`document`). What comes from a run (names, values, texts) is escaped
wherever it stands."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from attnres_train.reports.chart import Chart
from attnres_train.reports.curves import curves_of, loss_curves, time_axis, token_axis
from attnres_train.reports.differences import differences
from attnres_train.reports.document import document, figures, scrolling, swatch
from attnres_train.reports.measures import Measures, by_corpus, measures
from attnres_train.reports.parts import configurations, environment, pictures, samples
from attnres_train.reports.reading import Run
from attnres_train.reports.summary import changed
from attnres_train.reports.table import HEADINGS, cells

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
    sections = [
        ("Results", _results([measures(run) for run in runs])),
        ("Loss", _loss(charts[:2], labels)),
        ("Differences between the configurations", _differences(runs)),
        ("Changed while it ran", _changes(runs)),
        ("Depth attention and experts", pictures(runs)),
        ("Samples", samples(runs)),
        ("More curves", figures(charts[2:], labels)),
        ("Environment", environment(runs)),
        ("Configurations", configurations(runs)),
    ]
    return document(", ".join(labels), "Training report", sections, charts)


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
    return figures(charts, labels) + note


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
