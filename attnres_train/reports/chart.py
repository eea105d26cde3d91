"""A chart as inline SVG, which the page's style colors and its script makes tell values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import groupby
from typing import Any

from attnres_train.reports.curves import Axis, Curve, Point

COLORS = 8
"""In the page's style, by the number of a run; after them they come again."""
_DASHES = ("", "9 3", "2.5 3", "9 3 2.5 3")
WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 70, 16, 12, 50


@dataclass(frozen=True)
class Chart:
    """``curves`` over ``axis``. ``name`` is its title, ``unit`` what y is in."""

    key: str
    name: str
    unit: str
    axis: Axis
    curves: Sequence[Curve]
    reached: Sequence[float] = ()
    """Values that y has to reach besides."""

    @cached_property
    def x_range(self) -> tuple[float, float]:
        xs = [p.x for curve in self.curves for p in curve.points if math.isfinite(p.x)]
        if self.axis.is_log:
            return _widened(min(xs, default=0.0), max(xs, default=1.0), 0.05)
        return _widened(0.0, max(xs, default=1.0), 0.0)

    @cached_property
    def y_range(self) -> tuple[float, float]:
        """By the lines and the marks: one spike would press all else flat. What of the envelope
        lies beyond is cut off."""
        ys = [p.y for curve in self.curves for p in curve.points if math.isfinite(p.y)]
        ys += [y for curve in self.curves for _, y in curve.marks]
        ys += [y for curve in self.curves for strand in curve.strands for _, y in strand]
        ys += self.reached
        return _widened(min(ys, default=0.0), max(ys, default=1.0), 0.05)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def svg(self, labels: Sequence[str]) -> str:
        """``labels`` are the runs' names, for those who cannot see it."""
        told = ", ".join(f"{labels[c.run]} ends at {number(_last(c))}" for c in self.curves)
        parts = [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" '
            f'aria-label="{escape(f"{self.name}: {told}")}" data-chart="{self.key}">',
            f'<clipPath id="clip-{self.key}"><rect x="{LEFT}" y="{TOP}" '
            f'width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"/></clipPath>',
            *self._grid(),
            f'<g clip-path="url(#clip-{self.key})">',
            *(line for curve in self.curves for line in self._envelope(curve)),
            *(line for curve in self.curves for line in self._strands(curve)),
            *(line for curve in self.curves for line in self._line(curve)),
            "</g>",
            *(mark for curve in self.curves for mark in self._marks(curve, labels)),
            f'<line class="guide" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/>',
            "</svg>",
        ]
        return "\n".join(parts)

    def data(self) -> dict[str, Any]:
        """What the script tells: plain numbers, null where there is none."""
        return {
            "unit": f"{self.axis.unit} {'' if self.axis.is_time else self.axis.label}".strip(),
            "log": self.axis.is_log,
            "x": [*self.x_range, LEFT, WIDTH - RIGHT, WIDTH],
            "curves": [
                {
                    "run": curve.run,
                    "points": [[_short(value) for value in point] for point in curve.points],
                    "marks": [[_short(x), _short(y)] for x, y in curve.marks],
                }
                for curve in self.curves
            ],
        }

    def _grid(self) -> Iterator[str]:
        for tick in ticks(*self.y_range, 5):
            y = self.y(tick)
            kind = "grid" if tick or self.y_range[0] >= 0 else "grid zero"
            ends = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
            yield f'<line class="{kind}" {ends}/>'
            yield f'<text class="tick y" x="{LEFT - 8}" y="{y + 4.5:.1f}">{number(tick)}</text>'
        for tick in ticks(*self.x_range, 5):
            x, y = self.x(tick), HEIGHT - BOTTOM + 20
            told = number(10**tick if self.axis.is_log else tick)
            yield f'<text class="tick x" x="{x:.1f}" y="{y}">{told}</text>'
        unit = f" ({self.axis.unit})" if self.axis.unit else ""
        yield (
            f'<text class="tick x" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}">'
            f"{escape(self.axis.label + unit)}</text>"
        )

    def _envelope(self, curve: Curve) -> Iterator[str]:
        for part in _unbroken(curve.points):
            there = [f"{self.x(p.x):.1f} {self.y(p.high):.1f}" for p in part]
            back = [f"{self.x(p.x):.1f} {self.y(p.low):.1f}" for p in reversed(part)]
            kind = f"envelope {_color(curve)}"
            yield f'<path class="{kind}" data-run="{curve.run}" d="M{"L".join(there + back)}Z"/>'

    def _strands(self, curve: Curve) -> Iterator[str]:
        for strand in curve.strands:
            points = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in strand)
            yield (
                f'<polyline class="curve strand {_color(curve)}" data-run="{curve.run}" '
                f'points="{points}"/>'
            )

    def _line(self, curve: Curve) -> Iterator[str]:
        for part in _unbroken(curve.points):
            points = " ".join(f"{self.x(p.x):.1f},{self.y(p.y):.1f}" for p in part)
            yield (
                f'<polyline class="curve {_color(curve)}" data-run="{curve.run}" '
                f'stroke-dasharray="{dash(curve.run)}" points="{points}"/>'
            )

    def _marks(self, curve: Curve, labels: Sequence[str]) -> Iterator[str]:
        for x, y in curve.marks:
            hint = f"{labels[curve.run]}, validation: {number(y)}"
            yield (
                f'<circle class="mark {_color(curve)}" data-run="{curve.run}" '
                f'cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="4"><title>{escape(hint)}</title>'
                "</circle>"
            )


def dash(run: int) -> str:
    """So that curves are told apart without colors too, and where colors come again."""
    return _DASHES[(run + run // COLORS) % len(_DASHES)]


def _color(curve: Curve) -> str:
    return f"run-{curve.run % COLORS}"


def _last(curve: Curve) -> float:
    return next((p.y for p in reversed(curve.points) if math.isfinite(p.y)), math.nan)


def _unbroken(points: Sequence[Point]) -> Iterator[list[Point]]:
    """Where a curve is not finite it is interrupted."""
    for whole, part in groupby(points, key=lambda p: math.isfinite(p.x) and math.isfinite(p.y)):
        if whole:
            yield list(part)


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    room = (high - low) * share
    return (low - room, high + room) if high > low else (low - 0.5, high + 0.5)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from ``low`` to ``high``, ``most`` + 1 at most."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(
        factor * power for factor in (1, 2, 5, 10, 20) if (high - low) / (factor * power) <= most
    )
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """With four digits at most: 4.649, 0.002, 12,340, 1.2e-05."""
    if not math.isfinite(value):
        return "none"
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.3g}"
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:,.{min(digits, 7)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
