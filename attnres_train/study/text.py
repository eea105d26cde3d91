"""The report of a study for a screen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from attnres_train.planning.text import table
from attnres_train.study.analysis import Analysis, Cell, Comparison, Group
from attnres_train.study.scaling import Scaling, scalings
from attnres_train.study.statistics import Interval

_COURSE_ROWS = 8


def as_text(analysis: Analysis) -> str:
    record = analysis.record
    missing = len(record["missing"])
    there = len(record["runs"])
    parts = [
        f"study {record['study']}: {there} of {there + missing} runs have ended; "
        f"{analysis.report['metric']}, {analysis.report['take']} value, nats per token"
    ]
    if missing:
        parts[0] += "\nof the others nothing is in this report: " + ", ".join(record["missing"][:6])
    for group in analysis.groups:
        parts += list(_group(analysis, group))
    parts += [_scaling(analysis, one) for one in scalings(analysis)]
    return "\n\n".join(parts)


def named(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{axis} {label}" for axis, label in labels.items())


def _group(analysis: Analysis, group: Group) -> Iterator[str]:
    title = f"means ({named(group.labels)})" if group.labels else "means"
    header = [analysis.compare or "", analysis.tune or "", "runs", "mean", "sd", ""]
    rows = [_cell(analysis, group, cell) for cell in group.cells if cell.values]
    if not rows:
        return
    yield table(title, header, rows, left=1, last_left=True)
    for kind in sorted(group.at_edge):
        yield (
            f"{analysis.tune} {group.best[kind].tuned} is at the edge of its values, and the best "
            f"for {kind}: a better one may lie beyond"
        )
    if group.tuned:
        each = f", each at its best {analysis.tune}" if analysis.tune else ""
        yield _differences(analysis, f"difference from {analysis.baseline}{each}", group.tuned)
    if group.alike:
        title = f"difference from {analysis.baseline}, at the same {analysis.tune}"
        yield _differences(analysis, title, group.alike)
    for comparison in group.tuned:
        yield _course(analysis, group, comparison)
    yield _cost(analysis, group)


def _cell(analysis: Analysis, group: Group, cell: Cell) -> list[str]:
    notes = []
    if len(group.cells) > len(group.best) and group.best[cell.kind] == cell:
        notes.append("best")
    if len(cell.values) < cell.wanted:
        notes.append(f"{cell.wanted - len(cell.values)} missing or diverged")
    spread = "" if cell.deviation is None else f"{cell.deviation:.4f}"
    count = str(len(cell.values))
    return [cell.kind, cell.tuned, count, f"{cell.mean:.4f}", spread, ", ".join(notes)]


def _differences(analysis: Analysis, title: str, comparisons: Sequence[Comparison]) -> str:
    percent = f"{100 * analysis.report['confidence']:g} %"
    header = [analysis.compare or "", analysis.tune or "", "pairs", "mean", "sd", "t", "p"]
    header += [f"{percent} (t)", "(bootstrap)", "each"]
    rows = []
    for one in comparisons:
        found, at = one.difference, one.tuned
        if one.tuned != one.baseline_tuned:
            at += f" / {one.baseline_tuned}"
        numbers = [
            _number(found.deviation, ".4f"),
            _number(found.t, "+.2f"),
            _number(found.p, ".3f"),
            between(found.student),
            between(found.bootstrap),
        ]
        each = " ".join(f"{value:+.4f}" for value in found.each)
        rows.append([one.kind, at, len(found.each), f"{found.mean:+.4f}", *numbers, each])
    return table(title, header, rows, left=1, last_left=True)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def between(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.low:+.4f} .. {interval.high:+.4f}"


def _course(analysis: Analysis, group: Group, comparison: Comparison) -> str:
    course = analysis.course(group, comparison)
    step = max(1, -(-len(course) // _COURSE_ROWS))
    shown = course[::-1][::step][::-1]  # the last one always
    rows = [[f"{tokens:,}", f"{one.mean:+.4f}", between(one.student)] for tokens, one in shown]
    title = f"{comparison.kind} - {analysis.baseline} by tokens"
    return table(title, ["tokens", "mean", f"{100 * analysis.report['confidence']:g} % (t)"], rows)


def _cost(analysis: Analysis, group: Group) -> str:
    """Times are this machine's, and of whatever else it did."""
    rows = []
    for kind, cell in group.best.items():
        runs = [analysis.run(group.labels, kind, cell.tuned, pair) for pair in cell.values]
        times = [run["times"] for run in runs if run is not None]
        steps = sorted(one["step_seconds"] for one in times)
        speed = sorted(one["tokens_per_second"] for one in times)
        middle = len(times) // 2
        rows.append([kind, f"{steps[middle]:.3f}", f"{speed[middle]:,.0f}"])
    return table("cost here", ["", "s/step", "tokens/s"], rows, left=1)


def _scaling(analysis: Analysis, scaling: Scaling) -> str:
    title = "loss = E + A C^-alpha, C in PFLOP/s-days"
    title += f" ({named(scaling.labels)})" if scaling.labels else ""
    if scaling.problem:
        return f"{title}: none, {scaling.problem}"
    rows = []
    for kind, one in scaling.fits.items():
        saved = ""
        if kind in scaling.multipliers:
            times, interval = scaling.multipliers[kind]
            saved = f"{times:.3f} ({interval.low:.3f} .. {interval.high:.3f})"
        rows.append(
            [
                kind,
                f"{one.law.scale:.4f}",
                f"{one.law.exponent:.4f}",
                f"{one.exponent.low:.4f} .. {one.exponent.high:.4f}",
                f"{one.law.floor:.4f}",
                saved,
            ]
        )
    header = ["", "A", "alpha", "interval", "E", f"compute that {analysis.baseline} needs"]
    return table(title, header, rows, left=1)
