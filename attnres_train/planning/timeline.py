"""The picture of a simulated step: for each rank its passes and waits, what it sends, what it
stores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from attnres_train.pipeline.plan.simulate import Pass, Timeline, Transfer
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.planning.shapes import Area, Box, Line, Picture, Text
from attnres_train.planning.window import Scale, Stretch, telling

_WIDTH, _LEFT, _RIGHT, _TOP = 1600, 92, 24, 66
_PASS, _WIRE, _STORE, _GAP = 26, 8, 22, 14  # heights of a rank's lanes, and the gap below them
_LANES = _PASS + _WIRE + _STORE + _GAP
_BOTTOM, _BREAK = 66, 26
_THIN = 2.0  # pixels: transfers narrower than this are drawn as one with those next to them
_LABEL = 13.0  # pixels that a pass needs to carry its micro-batch
_FORWARD = ((0xBF, 0xDB, 0xF7), (0x2F, 0x6F, 0xB8))  # first to last virtual stage
_BACKWARD = ((0xFB, 0xDF, 0xB5), (0xD0, 0x7A, 0x1E))
_URGENT, _RELAXED, _WAIT, _BLOCKS = "#c0392b", "#7fb59a", "#e3e7ed", "#cdbfe3"


def draw_timeline(
    plan: TransportPlan, timeline: Timeline, mode: str, shown: Sequence[Stretch] | None = None
) -> Picture:
    """The picture of a recorded ``timeline``, of the stretches ``shown`` (default: those that
    tell most). Hovering names pass or transfer, blocks and times."""
    return _Drawing(plan, timeline, mode, shown or telling(timeline)).picture()


class _Drawing:
    def __init__(
        self, plan: TransportPlan, timeline: Timeline, mode: str, shown: Sequence[Stretch]
    ) -> None:
        self.plan, self.timeline, self.mode = plan, timeline, mode
        self.num_ranks = plan.layout.num_ranks
        self.scale = Scale.fitting(shown, _LEFT, _WIDTH - _LEFT - _RIGHT, _BREAK)
        self.floor = _TOP + self.num_ranks * _LANES
        self.stored = [list(self._stored_blocks(rank)) for rank in range(self.num_ranks)]
        self.peak = max((count for rank in self.stored for _, count in rank), default=0)

    def picture(self) -> Picture:
        shapes = [
            *self._legend(),
            *self._axis(),
            *(shape for rank in range(self.num_ranks) for shape in self._background(rank)),
            *(area for rank in range(self.num_ranks) for area in self._store(rank)),
            *(box for rank in range(self.num_ranks) for box in self._wires(rank)),
            *(shape for one in self.timeline.passes for shape in self._pass(one)),
            *self._breaks(),
        ]
        title = Text(_LEFT, 24, self._title(), "title")
        return Picture(_WIDTH, self.floor + _BOTTOM, self._title(), [title, *shapes])

    def y(self, rank: int) -> int:
        return _TOP + rank * _LANES

    def _title(self) -> str:
        layout, timeline = self.plan.layout, self.timeline
        shown = self.scale.stretches
        seconds = sum(end - begin for begin, end in shown)
        part = "" if seconds >= timeline.seconds * 0.9999 else f" ({_seconds(seconds)} of it here)"
        return (
            f"{self.mode}: {layout.num_ranks} ranks x {layout.num_virtual_stages} virtual stages, "
            f"step {_seconds(timeline.seconds)}{part}, idle {timeline.bubble:.1%}"
        )

    def _legend(self) -> Iterator[Box | Text]:
        legend = (
            (_rgb(_FORWARD, 0.5), "forward (darker: later virtual stage)"),
            (_rgb(_BACKWARD, 0.5), "backward"),
            (_WAIT, "idle"),
            (_URGENT, "sending what is waited for"),
            (_RELAXED, "sending history ahead, or its gradients after"),
            (_BLOCKS, f"blocks stored (full height: {self.peak})"),
        )
        x: float = _LEFT
        for color, label in legend:
            yield Box(x, 38, 12, 12, color, "legend")
            yield Text(x + 18, 48, label)
            x += 42 + 6.4 * len(label)

    def _axis(self) -> Iterator[Line | Text]:
        seconds = sum(end - begin for begin, end in self.scale.stretches)
        step = _nice_step(seconds / 12)
        for (begin, end), x in self.scale.places():
            for tick in range(int(begin / step), int(end / step) + 1):
                place = x + (tick * step - begin) * self.scale.pixels
                if begin <= tick * step <= end:
                    yield Line([(place, _TOP - 4), (place, self.floor)])
                    yield Text(place, self.floor + 16, _tick(tick * step, step), "axis")
        yield Text(
            _LEFT, self.floor + 52, "time since the step began; numbers: micro-batch", "pale"
        )

    def _breaks(self) -> Iterator[Line | Text]:
        """Two slanting strokes where something is left out, and how much."""
        places = list(self.scale.places())
        for ((_, left), _), ((right, _), x) in pairwise(places):
            for shift in (-17, -11):
                middle = x + shift
                for rank in range(self.num_ranks):
                    y = self.y(rank)
                    yield Line([(middle - 3, y + _PASS), (middle + 6, y)], "break")
            yield Text(
                x - _BREAK / 2, self.floor + 34, f"{_seconds(right - left)} left out", "axis"
            )

    def _background(self, rank: int) -> Iterator[Box | Text]:
        y, timeline = self.y(rank), self.timeline
        idle = 1 - timeline.compute_seconds[rank] / timeline.seconds
        yield Text(14, y + 13, f"rank {rank}")
        yield Text(14, y + 29, f"idle {idle:.1%}", "pale")
        for x, width in self.scale.spans(0.0, timeline.seconds):
            yield Box(x, y, width, _PASS, _WAIT, "idle")

    def _stored_blocks(self, rank: int) -> Iterator[tuple[float, int]]:
        """(time, blocks stored from then on): a forward pass brings blocks, its backward pass
        releases them."""
        changes = []
        for one in self.timeline.passes:
            if one.rank == rank:
                received = len(self.plan.received(one.action.chunk))
                produced = len(self.plan.produced(one.action.chunk))
                if one.action.kind == "F":
                    changes += [(one.start, received), (one.compute_end, produced)]
                else:
                    changes.append((one.end, -received - produced))
        count = 0
        for time, change in sorted(changes):  # at one time, releases first
            count += change
            yield time, count

    def _store(self, rank: int) -> Iterator[Area]:
        floor, height = self.y(rank) + _PASS + _WIRE + _STORE, _STORE - 3
        most = max((count for _, count in self.stored[rank]), default=0)
        for (begin, end), left in self.scale.places():
            # What is stored when the stretch begins, then every change within it.
            before = [count for time, count in self.stored[rank] if time <= begin]
            within = [(time, count) for time, count in self.stored[rank] if begin < time < end]
            top = floor - height * (before[-1] if before else 0) / max(self.peak, 1)
            points = [(left, float(floor)), (left, top)]
            for time, count in within:
                x = left + (time - begin) * self.scale.pixels
                points.append((x, top))
                top = floor - height * count / max(self.peak, 1)
                points.append((x, top))
            right = left + (end - begin) * self.scale.pixels
            points += [(right, top), (right, float(floor))]
            yield Area(points, _BLOCKS, f"rank {rank} stores at most {most} blocks")

    def _pass(self, one: Pass) -> Iterator[Box | Text]:
        kind, chunk, micro_batch = one.action
        layout = self.plan.layout
        stage = layout.virtual_stage(chunk) / max(layout.num_virtual_stages - 1, 1)
        color = _rgb(_FORWARD if kind == "F" else _BACKWARD, stage)
        hint = f"{one.action} on rank {one.rank}: {_times(one.start, one.end)}"
        y = self.y(one.rank)
        for x, width in self.scale.spans(one.start, one.compute_end):
            yield Box(x, y, width, _PASS, color, "pass", hint)
            if width >= _LABEL + 3.5 * max(0, len(str(micro_batch)) - 2):
                light = " light" if stage > 0.6 else ""
                yield Text(x + width / 2, y + 17, str(micro_batch), f"label{light}")

    def _wires(self, rank: int) -> list[Box]:
        """What ``rank`` sends. Of what is too thin to be seen, all that lies together is one box
        per color, as wide as its time."""
        y = self.y(rank) + _PASS + 1
        pending: dict[str, tuple[float, float, list[Transfer]]] = {}
        boxes = []
        sent = (transfer for transfer in self.timeline.transfers if transfer.src == rank)
        for transfer in sorted(sent, key=lambda one: one.start):
            color = _URGENT if transfer.part.share else _RELAXED
            for x, width in self.scale.spans(transfer.start, transfer.end):
                begin, end, together = pending.get(color, (x, x, []))
                if together and (x - end > _THIN / 2 or width >= _THIN or end - begin >= _THIN):
                    boxes.append(self._wire(pending.pop(color), y, color))
                    begin, together = x, []
                pending[color] = (begin, x + width, [*together, transfer])
        boxes += [self._wire(wire, y, color) for color, wire in pending.items()]
        return sorted(boxes, key=lambda box: box.x)

    def _wire(self, wire: tuple[float, float, list[Transfer]], y: float, color: str) -> Box:
        begin, end, transfers = wire
        one = transfers[0]
        if len(transfers) > 1:
            units = sum(transfer.part.units for transfer in transfers)
            hint = f"rank {one.src}: {len(transfers)} transfers, {units} units: "
        else:
            hint = (
                f"rank {one.src} to {one.dst}: {one.part.units} units for "
                f"{one.enables}{self._blocks(one)}: "
            )
        hint += _times(one.start, transfers[-1].end)
        return Box(begin, y, max(end - begin, 0.4), _WIRE, color, "wire", hint)

    def _blocks(self, transfer: Transfer) -> str:
        """The blocks of a transfer, where the transport is the plan's."""
        named = [f"block {block}" for block in transfer.part.blocks]
        named += ["the partial"] * transfer.part.partial
        kind = "gradients of " if transfer.enables.kind == "B" else ""
        return f" ({kind}{', '.join(named)})" if named else ""


def _rgb(ends: tuple[tuple[int, ...], tuple[int, ...]], share: float) -> str:
    """The colour at ``share`` (0..1) of the way between two."""
    mixed = (round(a + (b - a) * share) for a, b in zip(*ends, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def _nice_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below ``least``."""
    power = 1.0
    while power > least:
        power /= 10
    while power * 10 <= least:
        power *= 10
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return (
        f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 or not seconds else f"{seconds * 1e6:.3g} us"
    )


def _tick(seconds: float, step: float) -> str:
    """With as many digits as tell it from the next."""
    unit, name = next((u, n) for u, n in ((1, "s"), (1e-3, "ms"), (1e-6, "us")) if step >= u / 50)
    digits = 0 if step >= unit else 1 if step >= unit / 10 else 2
    return f"{seconds / unit:.{digits}f} {name}"


def _times(start: float, end: float) -> str:
    return f"{_seconds(start)} + {_seconds(end - start)}"
