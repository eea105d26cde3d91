"""Which times of a simulated step a picture shows, and where they lie in it.

A step of a thousand passes does not fit a screen, and drawn to its full length shows nothing. So a
picture has **stretches** of it, side by side at one scale, with a break where some is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from attnres_train.errors import UserError
from attnres_train.pipeline.plan.simulate import Pass, Timeline

PASSES = 125
"""Of typical length, as many fit beside each other so that each can carry its number."""
_EDGE = 0.4  # the share of them that warm-up and cool-down may take, each
_NEAR = 0.1  # a break that leaves out less than this share of what is shown is none
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_TIME = re.compile(r"([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)(s|ms|us|%)?")

Stretch = tuple[float, float]
"""Begin and end, in seconds from the start of the step."""


@dataclass(frozen=True)
class Scale:
    """Stretches from ``left`` on, ``pixels`` per second, with ``gap`` pixels for a break."""

    stretches: Sequence[Stretch]
    left: float
    pixels: float
    gap: float

    @staticmethod
    def fitting(stretches: Sequence[Stretch], left: float, width: float, gap: float) -> Scale:
        """That which fills ``width`` pixels."""
        seconds = sum(end - begin for begin, end in stretches)
        return Scale(stretches, left, (width - gap * (len(stretches) - 1)) / seconds, gap)

    def places(self) -> Iterator[tuple[Stretch, float]]:
        """Each stretch with the x at which it begins."""
        x = self.left
        for begin, end in self.stretches:
            yield (begin, end), x
            x += (end - begin) * self.pixels + self.gap

    def spans(self, start: float, end: float) -> Iterator[tuple[float, float]]:
        """(x, width) of what can be seen of the time from ``start`` to ``end``."""
        for (begin, last), x in self.places():
            first, until = max(start, begin), min(end, last)
            if first < until:
                yield x + (first - begin) * self.pixels, (until - first) * self.pixels


def telling(timeline: Timeline) -> list[Stretch]:
    """The stretches that tell most of a recorded ``timeline``: all of it where that can be seen;
    otherwise its warm-up, some of its steady state, and its cool-down."""
    visible = PASSES * median(one.compute_end - one.start for one in timeline.passes)
    if timeline.seconds <= visible * 1.2:
        return [(0.0, timeline.seconds)]
    edge = visible * _EDGE
    # What follows shows how one goes over into the other.
    more = visible / 20
    warm = min(_first_backward(timeline.passes) + more, edge)
    cool = min(timeline.seconds - _last_forward(timeline.passes) + more, edge)
    steady = visible - warm - cool
    middle = (timeline.seconds + warm - cool) / 2
    wanted = [
        (0.0, warm),
        (middle - steady / 2, middle + steady / 2),
        (timeline.seconds - cool, timeline.seconds),
    ]
    found = [wanted[0]]
    for begin, end in wanted[1:]:
        if begin - found[-1][1] > _NEAR * visible:
            found.append((begin, end))
        else:
            found[-1] = (found[-1][0], end)
    return found


def _first_backward(passes: Sequence[Pass]) -> float:
    """When rank 0 begins its first backward pass: from then on forward and backward alternate."""
    return min(p.start for p in passes if p.rank == 0 and p.action.kind == "B")


def _last_forward(passes: Sequence[Pass]) -> float:
    return max(p.start for p in passes if p.rank == 0 and p.action.kind == "F")


def asked(text: str, seconds: float) -> list[Stretch]:
    """The one stretch ``text`` of a step of ``seconds``: A:B in s, ms, us or % of the step; without
    A from its start, without B to its end. Raises UserError where that is no stretch of it."""
    first, colon, last = text.partition(":")
    begin_match, end_match = (_TIME.fullmatch(part.strip()) for part in (first, last))
    wrong = not colon or (first.strip() and not begin_match) or (last.strip() and not end_match)
    if wrong or not (begin_match or end_match):
        raise UserError(
            f"--window {text}: write A:B, times within the step such as 0:40ms, 1.2s:1.5s, 45%:55% "
            "or 90%:"
        )
    units = [match.group(2) for match in (begin_match, end_match) if match and match.group(2)]
    if not units and any(float(m.group(1)) for m in (begin_match, end_match) if m):
        raise UserError(f"--window {text}: say the unit: s, ms, us or % of the step")
    other = units[-1] if units else "s"

    def time(match: re.Match[str] | None, default: float) -> float:
        if match is None:
            return default
        unit = match.group(2) or other
        return float(match.group(1)) * (seconds / 100 if unit == "%" else _UNITS[unit])

    begin, end = time(begin_match, 0.0), min(time(end_match, seconds), seconds)
    if begin >= end:
        raise UserError(
            f"--window {text}: nothing of the step, which takes {seconds:.4g} s, lies in it"
        )
    return [(begin, end)]
