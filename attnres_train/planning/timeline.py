"""A simulated step as an SVG: for each rank its passes and waits, what it sends, what it stores."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from attnres_train.pipeline.plan.simulate import Pass, Timeline, Transfer
from attnres_train.pipeline.plan.transport_plan import TransportPlan

_WIDTH, _LEFT, _RIGHT, _TOP = 1600, 74, 24, 66
_PASS, _WIRE, _STORE, _GAP = 26, 8, 22, 14  # heights of a rank's lanes, and the gap below them
_LANES = _PASS + _WIRE + _STORE + _GAP
_BOTTOM = 44
_FORWARD = ((0xBF, 0xDB, 0xF7), (0x2F, 0x6F, 0xB8))  # first to last virtual stage
_BACKWARD = ((0xFB, 0xDF, 0xB5), (0xD0, 0x7A, 0x1E))
_URGENT, _RELAXED, _WAIT, _BLOCKS = "#c0392b", "#7fb59a", "#eceff3", "#cdbfe3"
_STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #2b3440 }
  .title { font-size: 16px; font-weight: 600 }
  .label { font-size: 10px; text-anchor: middle; pointer-events: none }
  .light { fill: #fff }
  .axis { text-anchor: middle; fill: #69737f }
  rect.pass { stroke: #fff; stroke-width: .6 }
  line { stroke: #dde1e7 }
"""


def draw_timeline(plan: TransportPlan, timeline: Timeline, mode: str) -> str:
    """SVG text of a recorded ``timeline``. Hovering names pass or transfer, blocks and times."""
    return _Drawing(plan, timeline, mode).svg()


class _Drawing:
    def __init__(self, plan: TransportPlan, timeline: Timeline, mode: str) -> None:
        self.plan, self.timeline, self.mode = plan, timeline, mode
        self.num_ranks = plan.layout.num_ranks
        self.scale = (_WIDTH - _LEFT - _RIGHT) / timeline.seconds
        self.floor = _TOP + self.num_ranks * _LANES
        self.stored = [list(self._stored_blocks(rank)) for rank in range(self.num_ranks)]
        self.peak = max((count for rank in self.stored for _, count in rank), default=0)

    def svg(self) -> str:
        height = self.floor + _BOTTOM
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
            f'viewBox="0 0 {_WIDTH} {height}">',
            f"<style>{_STYLE}</style>",
            f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
            *self._title(),
            *self._axis(),
            *(line for rank in range(self.num_ranks) for line in self._background(rank)),
            *(self._store(rank) for rank in range(self.num_ranks)),
            *(line for transfer in self.timeline.transfers for line in self._transfer(transfer)),
            *(line for one in self.timeline.passes for line in self._pass(one)),
            "</svg>",
        ]
        return "\n".join(parts) + "\n"

    def x(self, seconds: float) -> float:
        return _LEFT + seconds * self.scale

    def y(self, rank: int) -> float:
        return _TOP + rank * _LANES

    def _title(self) -> Iterator[str]:
        layout, timeline = self.plan.layout, self.timeline
        text = (
            f"{self.mode}: {layout.num_ranks} ranks x {layout.num_virtual_stages} virtual stages, "
            f"step {_seconds(timeline.seconds)}, idle {timeline.bubble:.1%}"
        )
        yield f'<text x="{_LEFT}" y="24" class="title">{escape(text)}</text>'
        legend = (
            (_rgb(_FORWARD, 0.5), "forward (darker: later virtual stage)"),
            (_rgb(_BACKWARD, 0.5), "backward"),
            (_WAIT, "waiting"),
            (_URGENT, "sending what is waited for"),
            (_RELAXED, "sending history ahead, or its gradients after"),
            (_BLOCKS, f"blocks stored (full height: {self.peak})"),
        )
        x: float = _LEFT
        for color, label in legend:
            yield f'<rect x="{x}" y="38" width="12" height="12" rx="2" fill="{color}"/>'
            yield f'<text x="{x + 18}" y="48">{label}</text>'
            x += 42 + 6.4 * len(label)

    def _axis(self) -> Iterator[str]:
        step = _nice_step(self.timeline.seconds / 10)
        for tick in range(int(self.timeline.seconds / step) + 1):
            x, label = self.x(tick * step), _seconds(tick * step)
            yield f'<line x1="{x:.1f}" y1="{_TOP - 4}" x2="{x:.1f}" y2="{self.floor}"/>'
            yield f'<text x="{x:.1f}" y="{self.floor + 16}" class="axis">{label}</text>'

    def _background(self, rank: int) -> Iterator[str]:
        y, width = self.y(rank), self.timeline.seconds * self.scale
        yield f'<text x="{_LEFT - 12}" y="{y + 17}" text-anchor="end">rank {rank}</text>'
        yield f'<rect x="{_LEFT}" y="{y}" width="{width:.2f}" height="{_PASS}" fill="{_WAIT}"/>'

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

    def _store(self, rank: int) -> str:
        floor = self.y(rank) + _PASS + _WIRE + _STORE
        path, height = [f"M{_LEFT} {floor}"], _STORE - 3
        for time, count in self.stored[rank]:
            top = floor - height * count / max(self.peak, 1)
            path.append(f"H{self.x(time):.2f}V{top:.2f}")
        most = max((count for _, count in self.stored[rank]), default=0)
        return (
            f'<path d="{"".join(path)}V{floor}Z" fill="{_BLOCKS}"><title>rank {rank} stores at '
            f"most {most} blocks</title></path>"
        )

    def _pass(self, one: Pass) -> Iterator[str]:
        kind, chunk, micro_batch = one.action
        layout = self.plan.layout
        stage = layout.virtual_stage(chunk) / max(layout.num_virtual_stages - 1, 1)
        color = _rgb(_FORWARD if kind == "F" else _BACKWARD, stage)
        x, width = self.x(one.start), (one.compute_end - one.start) * self.scale
        hint = f"{one.action} on rank {one.rank}: {_times(one.start, one.end)}"
        yield _rect(x, self.y(one.rank), width, _PASS, color, hint, "pass")
        if width >= 13:
            light = " light" if stage > 0.6 else ""
            yield (
                f'<text x="{x + width / 2:.1f}" y="{self.y(one.rank) + 17}" '
                f'class="label{light}">{micro_batch}</text>'
            )

    def _transfer(self, transfer: Transfer) -> Iterator[str]:
        x, width = self.x(transfer.start), (transfer.end - transfer.start) * self.scale
        y = self.y(transfer.src) + _PASS + 1
        hint = (
            f"rank {transfer.src} to {transfer.dst}: {transfer.part.units} units for "
            f"{transfer.enables}{self._blocks(transfer)}: {_times(transfer.start, transfer.end)}"
        )
        color = _URGENT if transfer.part.share else _RELAXED
        yield _rect(x, y, max(width, 0.4), _WIRE, color, hint, "wire")

    def _blocks(self, transfer: Transfer) -> str:
        """The blocks of a transfer, where the transport is the plan's."""
        named = [f"block {block}" for block in transfer.part.blocks]
        named += ["the partial"] * transfer.part.partial
        kind = "gradients of " if transfer.enables.kind == "B" else ""
        return f" ({kind}{', '.join(named)})" if named else ""


def _rect(x: float, y: float, width: float, height: float, color: str, hint: str, kind: str) -> str:
    return (
        f'<rect class="{kind}" x="{x:.2f}" y="{y}" width="{width:.2f}" height="{height}" '
        f'fill="{color}"><title>{escape(hint)}</title></rect>'
    )


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


def _times(start: float, end: float) -> str:
    return f"{_seconds(start)} + {_seconds(end - start)}"
