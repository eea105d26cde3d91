"""What the report of a study says, as tables and sentences: for a screen (`text`), for a page
(`page`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from attnres_train.study.analysis import Analysis, Cell, Comparison, Group
from attnres_train.study.scaling import Scaling
from attnres_train.study.statistics import Interval

_COURSE_ROWS = 8


class Table(NamedTuple):
    """Columns are numbers, aligned right, but the first ones and maybe the last."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    left: int = 1
    """Columns aligned left: the first one is a kind then."""
    last_left: bool = False


def headline(analysis: Analysis) -> str:
    """How many runs have ended, and what is measured; on a second line what is missing."""
    record = analysis.record
    missing, there = len(record["missing"]), len(record["runs"])
    told = (
        f"study {record['study']}: {there} of {there + missing} runs have ended; "
        f"{analysis.report['metric']}, {analysis.report['take']} value, {unit(analysis)}"
    )
    if missing:
        told += "\nof the others nothing is in this report: " + ", ".join(record["missing"][:6])
    return told


def unit(analysis: Analysis) -> str:
    in_bytes = "bits_per_byte" in analysis.report["metric"]
    return "bits per byte" if in_bytes else "nats per token"


def named(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{axis} {label}" for axis, label in labels.items())


def percent(analysis: Analysis) -> str:
    return f"{100 * analysis.report['confidence']:g} %"


def means(analysis: Analysis, group: Group) -> Table | None:
    """Of the cells with a run; None where there is none."""
    title = f"means ({named(group.labels)})" if group.labels else "means"
    header = [analysis.compare or "", analysis.tune or "", "runs", "mean", "sd", ""]
    rows = [_cell(group, cell) for cell in group.cells if cell.values]
    return Table(title, header, rows, last_left=True) if rows else None


def _cell(group: Group, cell: Cell) -> list[str]:
    notes = []
    if len(group.cells) > len(group.best) and group.best[cell.kind] == cell:
        notes.append("best")
    if len(cell.values) < cell.wanted:
        notes.append(f"{cell.wanted - len(cell.values)} missing or diverged")
    spread = "" if cell.deviation is None else f"{cell.deviation:.4f}"
    count = str(len(cell.values))
    return [cell.kind, cell.tuned, count, f"{cell.mean:.4f}", spread, ", ".join(notes)]


def edges(analysis: Analysis, group: Group) -> Iterator[str]:
    """What is to be said of best values at the edge of what was tried."""
    for kind in sorted(group.at_edge):
        yield (
            f"{analysis.tune} {group.best[kind].tuned} is at the edge of its values, and the best "
            f"for {kind}: a better one may lie beyond"
        )


def differences(analysis: Analysis, group: Group) -> Iterator[Table]:
    """From the baseline: each kind at its best, and all at the same value of the tuned axis."""
    if group.tuned:
        each = f", each at its best {analysis.tune}" if analysis.tune else ""
        title = f"difference from {analysis.baseline}{each}"
        yield _differences(analysis, title, group.tuned)
    if group.alike:
        title = f"difference from {analysis.baseline}, at the same {analysis.tune}"
        yield _differences(analysis, title, group.alike)


def _differences(analysis: Analysis, title: str, comparisons: Sequence[Comparison]) -> Table:
    header = [analysis.compare or "", analysis.tune or "", "pairs", "mean", "sd", "t", "p"]
    header += [f"{percent(analysis)} (t)", "(bootstrap)", "each"]
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
    return Table(title, header, rows, last_left=True)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def between(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.low:+.4f} .. {interval.high:+.4f}"


def course(analysis: Analysis, group: Group, comparison: Comparison) -> Table:
    """The difference by tokens."""
    found = analysis.course(group, comparison)
    step = max(1, -(-len(found) // _COURSE_ROWS))
    shown = found[::-1][::step][::-1]  # the last one always
    rows = [[f"{tokens:,}", f"{one.mean:+.4f}", between(one.student)] for tokens, one in shown]
    title = f"{comparison.kind} - {analysis.baseline} by tokens"
    return Table(title, ["tokens", "mean", f"{percent(analysis)} (t)"], rows, left=0)


def cost(analysis: Analysis, group: Group) -> Table:
    """Times are this machine's, and of whatever else it did."""
    rows = []
    for kind, cell in group.best.items():
        runs = [analysis.run(group.labels, kind, cell.tuned, pair) for pair in cell.values]
        times = [run["times"] for run in runs if run is not None]
        steps = sorted(one["step_seconds"] for one in times)
        speed = sorted(one["tokens_per_second"] for one in times)
        middle = len(times) // 2
        rows.append([kind, f"{steps[middle]:.3f}", f"{speed[middle]:,.0f}"])
    return Table("cost here", ["", "s/step", "tokens/s"], rows)


def laws(analysis: Analysis, scaling: Scaling) -> Table | str:
    """Those of the kinds; why there are none, where there are none."""
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
        law, bounds = one.law, f"{one.exponent.low:.4f} .. {one.exponent.high:.4f}"
        numbers = (f"{law.scale:.4f}", f"{law.exponent:.4f}", bounds, f"{law.floor:.4f}", saved)
        rows.append([kind, *numbers])
    header = ["", "A", "alpha", "interval", "E", f"compute that {analysis.baseline} needs"]
    return Table(title, header, rows)
