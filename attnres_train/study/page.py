"""The report of a study as one page of HTML (`reports.document`), from its record alone. What comes
from the record (names of kinds, of axes) is escaped wherever it stands."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from statistics import fmean

from attnres_train.reports.chart import Chart
from attnres_train.reports.curves import Axis, Curve, Point, few, token_axis_to
from attnres_train.reports.document import document, figures, scrolling, swatch
from attnres_train.study.analysis import Analysis, Comparison, Group
from attnres_train.study.scaling import Scaling, scalings
from attnres_train.study.tables import (
    Table,
    cost,
    course,
    differences,
    edges,
    headline,
    laws,
    means,
    named,
    percent,
    unit,
)

_COMPUTE = Axis("compute", "PFLOP/s-days", 1.0, is_log=True)
_LAW_POINTS = 51
_FEW_PAIRS = 2
"""So many pairs have intervals that would press all else flat."""


def page(analysis: Analysis) -> str:
    """The HTML of the study of ``analysis``."""
    charts: list[Chart] = []
    told = "".join(f"<p>{escape(line)}</p>" for line in headline(analysis).splitlines())
    sections = [("What there is", told)]
    for number, group in enumerate(analysis.groups):
        found = _charts(analysis, group, number)
        if content := _group(analysis, group, found):
            sections.append((named(group.labels) or "Results", content))
            charts += found
    for number, scaling in enumerate(scalings(analysis)):
        drawn = [_law_chart(analysis, scaling, number)] if scaling.fits else []
        title = "Loss over compute"
        title += f", {named(scaling.labels)}" if scaling.labels else ""
        sections.append(
            (title, _either(analysis, laws(analysis, scaling)) + _drawn(analysis, drawn))
        )
        charts += drawn
    return document(analysis.record["study"], "Report of a study", sections, charts)


def _group(analysis: Analysis, group: Group, charts: list[Chart]) -> str:
    """Tables and charts of ``group``; nothing where no run of it has ended."""
    if (found := means(analysis, group)) is None:
        return ""
    parts = [_table(analysis, found)]
    parts += [f"<p>{escape(line)}</p>" for line in edges(analysis, group)]
    parts += [_table(analysis, one) for one in differences(analysis, group)]
    note = (
        "Thick line: mean of the runs of a kind, thin: each run. Difference: mean of the pairs, "
        f"shade: its {percent(analysis)} interval (t), cut off where it leaves the range."
    )
    parts.append(f'<h3>Course</h3>{_drawn(analysis, charts)}<p class="pale">{note}</p>')
    courses = [_table(analysis, course(analysis, group, one)) for one in group.tuned]
    if courses:
        parts.append(f"<details><summary>In numbers</summary>{''.join(courses)}</details>")
    return "".join([*parts, _table(analysis, cost(analysis, group))])


def _either(analysis: Analysis, found: Table | str) -> str:
    return f"<p>{escape(found)}</p>" if isinstance(found, str) else _table(analysis, found)


def _table(analysis: Analysis, one: Table) -> str:
    """Without the columns in which nothing stands."""
    rows = [list(map(str, row)) for row in one.rows]
    shown = [n for n, name in enumerate(one.header) if not n or name or any(row[n] for row in rows)]
    head = "".join(f'<th scope="col">{escape(one.header[n])}</th>' for n in shown)
    lines = []
    for row in rows:
        first, *others = (escape(row[n]) for n in shown)
        mark = swatch(analysis.kinds.index(row[0])) if one.left else ""
        cells = "".join(f"<td>{cell}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{mark}{first}</th>{cells}</tr>')
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    ends_left = one.last_left and shown[-1] == len(one.header) - 1
    kind = "numbers" if ends_left else "numbers to-the-end"
    table = f'<table class="{kind}">{body}</table>'
    return f"<h3>{escape(one.title)}</h3>{scrolling(table, one.title)}"


def _drawn(analysis: Analysis, charts: list[Chart]) -> str:
    return figures(charts, [kind or analysis.record["study"] for kind in analysis.kinds])


def _charts(analysis: Analysis, group: Group, number: int) -> list[Chart]:
    """The metric over tokens, and the differences from the baseline."""
    most = max((run["tokens"] for run in analysis.runs.values()), default=0)
    axis, metric = token_axis_to(most), analysis.report["metric"]
    losses = list(_losses(analysis, group, axis))
    found = [Chart(f"loss-{number}", metric, unit(analysis), axis, losses)] if losses else []
    if group.tuned:
        curves = [_difference(analysis, group, one, axis) for one in group.tuned]
        # The line of no difference, and the intervals of the last point.
        pairs = zip(curves, group.tuned, strict=True)
        ends = [curve.points[-1] for curve, one in pairs if len(one.pairs) > _FEW_PAIRS]
        reached = [0.0, *(y for end in ends for y in (end.low, end.high))]
        name = f"Difference from {analysis.baseline}"
        found.append(Chart(f"difference-{number}", name, unit(analysis), axis, curves, reached))
    return found


def _losses(analysis: Analysis, group: Group, axis: Axis) -> Iterator[Curve]:
    """Of each kind at its best: the mean at the tokens that all its runs were measured at."""
    for kind, cell in group.best.items():
        runs = (analysis.run(group.labels, kind, cell.tuned, pair) for pair in cell.values)
        each = [analysis.curve(run) for run in runs if run is not None]
        shared = sorted(set.intersection(*map(set, each)))
        points = []
        for tokens in few(shared):
            values = [one[tokens] for one in each]
            points.append(Point(tokens / axis.divisor, fmean(values), min(values), max(values)))
        strands = [
            [(tokens / axis.divisor, value) for tokens, value in few(sorted(one.items()))]
            for one in each
        ]
        if points:
            number = analysis.kinds.index(kind)
            yield Curve(number, points, 1, strands=strands if len(each) > 1 else ())


def _difference(analysis: Analysis, group: Group, comparison: Comparison, axis: Axis) -> Curve:
    points = []
    for tokens, one in few(analysis.course(group, comparison)):
        low, high = one.student or (one.mean, one.mean)
        points.append(Point(tokens / axis.divisor, one.mean, low, high))
    return Curve(analysis.kinds.index(comparison.kind), points, 1)


def _law_chart(analysis: Analysis, scaling: Scaling, number: int) -> Chart:
    """The fitted laws, and the means that they are fitted to as marks."""
    curves = []
    for kind, one in scaling.fits.items():
        marks = [(math.log10(compute), loss) for compute, loss in scaling.points[kind]]
        low, high = min(marks)[0], max(marks)[0]
        xs = [low + (high - low) * n / (_LAW_POINTS - 1) for n in range(_LAW_POINTS)]
        losses = [one.law.loss(10**x) for x in xs]
        points = [Point(x, loss, loss, loss) for x, loss in zip(xs, losses, strict=True)]
        curves.append(Curve(analysis.kinds.index(kind), points, 1, marks))
    return Chart(f"law-{number}", "Loss over compute", unit(analysis), _COMPUTE, curves)
