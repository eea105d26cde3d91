"""What a picture is made of, and how it becomes a file: SVG, or PNG through matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from attnres_train.errors import UserError

SUFFIXES = (".svg", ".png")
MOST_HINTS = 5000
"""A picture of more shapes names none of them under the pointer: it would weigh a megabyte."""
_EDGE_FROM = 2.0  # pixels: the white edge of anything narrower would cover it
_SIZES = {"title": 16.0, "label": 10.0}
_TEXT, _PALE, _GRID, _SHEET = "#2b3440", "#5f6873", "#dde1e7", "#ffffff"
_STYLE = f"""
text {{ font: 12px system-ui, sans-serif; fill: {_TEXT} }}
.title {{ font-size: 16px; font-weight: 600 }}
.label {{ font-size: 10px; text-anchor: middle; pointer-events: none }}
.light {{ fill: #fff }}
.axis {{ text-anchor: middle; fill: {_PALE} }}
.pale {{ fill: {_PALE} }}
.edged {{ stroke: #fff; stroke-width: .6 }}
line {{ stroke: {_GRID} }}
.break {{ stroke: {_PALE}; fill: none }}
"""


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels. ``kind``: what it stands for."""

    x: float
    y: float
    width: float
    height: float
    color: str
    kind: str
    hint: str = ""

    @property
    def edged(self) -> bool:
        return self.kind == "pass" and self.width >= _EDGE_FROM


@dataclass(frozen=True)
class Text:
    """``kind``, of which there may be several: title, label (middle, small), light, axis, pale."""

    x: float
    y: float
    text: str
    kind: str = ""


@dataclass(frozen=True)
class Line:
    points: Sequence[tuple[float, float]]
    kind: str = ""
    """break, or a line of the grid."""


@dataclass(frozen=True)
class Area:
    """A filled polygon."""

    points: Sequence[tuple[float, float]]
    color: str
    hint: str = ""


@dataclass(frozen=True)
class Picture:
    """``shapes`` in the order in which they are drawn, on a white sheet, in pixels."""

    width: int
    height: int
    description: str
    shapes: Sequence[Box | Text | Line | Area]

    def svg(self) -> str:
        """SVG text. The pointer over a shape shows its hint, unless there are too many."""
        hints = sum(isinstance(shape, Box) for shape in self.shapes) <= MOST_HINTS
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" role="img">',
            f"<desc>{escape(self.description)}</desc>",
            f"<style>{_STYLE}</style>",
            f'<rect width="{self.width}" height="{self.height}" fill="{_SHEET}"/>',
            *(_svg(shape, hints) for shape in self.shapes),
            "</svg>",
        ]
        return "\n".join(parts) + "\n"

    def write(self, path: Path, option: str) -> None:
        """Write ``path`` by its suffix. Raises UserError, naming the command's ``option``, where it
        cannot be written, or without matplotlib for a PNG."""
        try:
            if path.suffix.lower() == ".png":
                _write_png(self, path, option)
            else:
                path.write_text(self.svg(), encoding="utf-8")
        except OSError as error:
            raise UserError(f"{option} {path}: {error.strerror}") from error


def check_suffix(path: Path, option: str) -> None:
    """Raises UserError where ``path`` ends in none of `SUFFIXES`."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{option} {path}: name a file that ends in {' or '.join(SUFFIXES)}")


def _svg(shape: Box | Text | Line | Area, hints: bool) -> str:
    match shape:
        case Box():
            kind = f"{shape.kind} edged" if shape.edged else shape.kind
            place = (
                f'<rect class="{kind}" x="{_n(shape.x)}" y="{_n(shape.y)}" '
                f'width="{_n(shape.width)}" height="{_n(shape.height)}" fill="{shape.color}"'
            )
            return place + _title(shape.hint if hints else "", "rect")
        case Text():
            kind = f' class="{shape.kind}"' if shape.kind else ""
            return f'<text x="{_n(shape.x)}" y="{_n(shape.y)}"{kind}>{escape(shape.text)}</text>'
        case Line():
            if shape.kind:
                points = " ".join(f"{_n(x)},{_n(y)}" for x, y in shape.points)
                return f'<polyline class="{shape.kind}" points="{points}"/>'
            (x, y), (x2, y2) = shape.points
            return f'<line x1="{_n(x)}" y1="{_n(y)}" x2="{_n(x2)}" y2="{_n(y2)}"/>'
        case Area():
            points = "L".join(f"{_n(x)} {_n(y)}" for x, y in shape.points)
            return f'<path d="M{points}Z" fill="{shape.color}"' + _title(shape.hint, "path")


def _title(hint: str, tag: str) -> str:
    return f"><title>{escape(hint)}</title></{tag}>" if hint else "/>"


def _n(value: float) -> str:
    """Hundredths of a pixel are enough."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _write_png(picture: Picture, path: Path, option: str, scale: float = 1.5) -> None:
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Polygon, Rectangle
    except ImportError as error:
        raise UserError(
            f"{option} {path}: a PNG needs matplotlib: pip install 'attnres-train[plot]', or name "
            "an .svg"
        ) from error
    dpi = 72 * scale  # a pixel of ours is a point there
    figure = Figure((picture.width / 72, picture.height / 72), dpi=dpi, facecolor=_SHEET)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, picture.width), ylim=(picture.height, 0))
    axes.set_axis_off()
    for order, shape in enumerate(picture.shapes):
        match shape:
            case Box():
                corner, edge = (shape.x, shape.y), 0.6 if shape.edged else 0
                box = Rectangle(corner, shape.width, shape.height, edgecolor="#fff", linewidth=edge)
                box.set(facecolor=shape.color, zorder=order)
                axes.add_patch(box)
            case Area():
                axes.add_patch(Polygon(list(shape.points), facecolor=shape.color, zorder=order))
            case Line():
                color = _PALE if shape.kind else _GRID
                xs, ys = zip(*shape.points, strict=True)
                axes.plot(xs, ys, color=color, linewidth=1, zorder=order)
            case Text():
                axes.text(shape.x, shape.y, shape.text, zorder=order, **_font(shape.kind))
    figure.savefig(path, dpi=dpi)


def _font(kinds: str) -> dict[str, Any]:
    """matplotlib's words for the kinds of a `Text`."""
    kind = kinds.split()
    size = next((_SIZES[name] for name in kind if name in _SIZES), 12.0)
    colors: Iterator[str] = (
        color for name, color in {"light": "#fff", "axis": _PALE, "pale": _PALE}.items()
        if name in kind
    )  # fmt: skip
    return {
        # The default font is wider than a browser's.
        "fontsize": size * 0.92,
        "color": next(colors, _TEXT),
        "fontweight": "bold" if "title" in kind else "normal",
        "ha": "center" if {"label", "axis"} & set(kind) else "left",
    }
