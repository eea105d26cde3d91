"""How pictures of observations look. matplotlib is imported when they are drawn.

Grounds are transparent, and ink is of middle lightness, so that a picture reads on white and on
dark; what is told by colour is told by shape or number too, and colour maps suit the colour-blind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attnres_train.observe.observed import Arrays

INK = "#7d7d7d"
COLOURS = ("#2b8cc4", "#d1690e", "#2f9e6e", "#b5559c")
STYLE: Any = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 10,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.25,
    "legend.framealpha": 0.0,
    "legend.labelcolor": INK,
    "font.size": 9,
}
_MOST_NUMBERS = 200
"""Cells of a map in which their values are written."""


def style() -> Any:
    """The context in which pictures are drawn."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def over_depth(axes: Any, history: Mapping[int, Arrays], key: str, first: int) -> None:
    """Lines of ``key`` over sublayers from ``first``; earlier steps fainter and without marks."""
    known = [(step, arrays[key]) for step, arrays in history.items() if key in arrays]
    for place, (step, values) in enumerate(known):
        is_last = place == len(known) - 1
        axes.plot(
            np.arange(first, first + len(values)),
            values,
            "o-" if is_last else (":", "-.", "--")[place % 3],
            color=COLOURS[0] if is_last else INK,
            markersize=3.5,
            linewidth=1.5 if is_last else 1.0,
            label=f"step {step:,}",
        )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid()
    if len(known) > 1:
        axes.legend(loc="upper left", ncols=len(known), fontsize=8)
        axes.margins(y=0.25)


def colour_map(
    axes: Any, values: np.ndarray, colours: str, limits: tuple[float, float | None]
) -> Any:
    """``values`` as colours, and as numbers where there are few."""
    image = axes.imshow(values, aspect="auto", cmap=colours, vmin=limits[0], vmax=limits[1])
    axes.tick_params(length=2)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if values.size <= _MOST_NUMBERS and values.shape[1] <= 20:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                *rgb, _ = image.cmap(image.norm(value))
                is_light = np.dot(rgb, (0.299, 0.587, 0.114)) > 0.55
                text = f"{value:.2f}".removeprefix("0") if value < 1 else f"{value:.1f}"
                ink = "#111111" if is_light else "#f5f5f5"
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color=ink)
    return image


def ticks(axis: Any, labels: Sequence[str], most: int = 28) -> None:
    """Ticks at every place, or at as many as can be read."""
    stride = -(-len(labels) // most)
    places = [*range(0, len(labels), stride)]
    if places[-1] != len(labels) - 1 and stride > 1:  # the last one is the head
        places[-1] = len(labels) - 1
    axis.set_ticks(places, [labels[place] for place in places])


def in_bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"
