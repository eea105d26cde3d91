"""Measures of runs and their differences as text, and the words of both for a page."""

from __future__ import annotations

from collections.abc import Sequence

from attnres_train.reports.differences import Difference
from attnres_train.reports.measures import Measures

HEADINGS = (
    "run",
    "step",
    "tokens",
    "loss",
    "best validation",
    "bits/byte",
    "tokens/s",
    "time",
    "memory",
)
_NONE = "-"
_MOST = 26  # characters of a run's name, so that a line fits a screen


def cells(one: Measures) -> tuple[str, ...]:
    """Those of a run below `HEADINGS`."""
    best = _NONE
    if one.best_validation_loss is not None:
        best = f"{one.best_validation_loss:.4f} at {one.best_validation_step:,}"
    return (
        one.run,
        f"{one.step:,}/{one.steps:,}" if one.steps else f"{one.step:,}",
        _count(one.tokens),
        _NONE if one.loss is None else f"{one.loss:.4f}",
        best,
        _NONE if one.bits_per_byte is None else f"{one.bits_per_byte:.4f}",
        _NONE if one.tokens_per_second is None else f"{one.tokens_per_second:,.0f}",
        _time(one.seconds),
        _NONE if one.memory_bytes is None else f"{one.memory_bytes / 2**30:.2f} GiB",
    )


def as_text(found: Sequence[Measures], between: Sequence[Difference]) -> str:
    """The table of several runs, and below it what sets them apart."""
    rows = [HEADINGS, *map(cells, found)]
    rows = [(_cut(row[0]), *row[1:]) for row in rows]
    widths = [max(len(row[n]) for row in rows) for n in range(len(HEADINGS))]
    lines = []
    for row in rows:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *rest]).rstrip())
    for one in found:
        if one.standing != "finished":
            lines.append(f"{one.run}: {one.standing}")
    if between:
        lines += ["", "differences (" + " | ".join(one.run for one in found) + ")"]
        width = max(len(one.key) for one in between)
        lines += [f"  {one.key:<{width}}  {' | '.join(map(_value, one.values))}" for one in between]
    elif len(found) > 1:
        lines += ["", "no differences between their configurations"]
    return "\n".join(lines)


def _cut(name: str) -> str:
    """Names differ at their ends more often than at their beginnings."""
    return name if len(name) <= _MOST else "..." + name[-(_MOST - 3) :]


def _value(text: str) -> str:
    return (text if len(text) <= 60 else text[:57] + "...") or _NONE


def _count(value: int | None) -> str:
    if value is None:
        return _NONE
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return _NONE
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours / 24:.1f} d"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
