"""Observations as pictures (docs/observing.md says how to read them). matplotlib is imported when
they are drawn (`observe.drawing`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from attnres_train.observe.drawing import (
    COLOURS,
    INK,
    colour_map,
    in_bytes,
    over_depth,
    style,
    ticks,
)
from attnres_train.observe.observed import Arrays, observed_steps, read_observation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_EARLIER = 3
"""Observations before the one shown that are drawn beside it."""


def pictures(run_folder: Path, step: int | None = None) -> dict[str, Figure]:
    """The pictures of the observation of ``step`` (default: the latest) in ``run_folder``, by name:
    ``depth_attention, magnitudes, query_norms, expert_load, block_store``, those of which there is
    something. None at all without observations, or without matplotlib."""
    steps = observed_steps(run_folder)
    step = step if step is not None else steps[-1] if steps else None
    if step not in steps:
        return {}
    before = [at for at in steps if at < step]
    # The first one and some of those after it, evenly.
    picked = sorted(
        {before[i * len(before) // _EARLIER] for i in range(_EARLIER)} if before else {}
    )
    history = {at: read_observation(run_folder, at) for at in [*picked, step]}
    return drawn(history)


def drawn(history: Mapping[int, Arrays]) -> dict[str, Figure]:
    """As `pictures`, of the last of ``history`` (ascending steps -> arrays)."""
    try:
        import matplotlib  # noqa: F401  (whether it is there)
    except ImportError:
        return {}
    step, arrays = list(history.items())[-1]
    with style():
        made = {
            "depth_attention": _depth_attention(step, arrays),
            "magnitudes": _magnitudes(history),
            "query_norms": _query_norms(history),
            "expert_load": _expert_load(step, arrays),
            "block_store": _block_store(step, arrays),
        }
    return {name: figure for name, figure in made.items() if figure is not None}


def save(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write each of ``figures`` to ``<name>.png`` in ``folder``, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=120)
    return paths


def pixels(figure: Figure) -> np.ndarray:
    """uint8 [height, width, 4], with transparency."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()).copy()


def weight_map(
    mean: np.ndarray, title: str, std: np.ndarray | None = None, note: str = ""
) -> Figure:
    """Weights [L + 1, N] of all reads, their spread beside them: row r is sublayer r + 1, the last
    one the output head. To be drawn in `drawing.style`."""
    from matplotlib.figure import Figure

    rows, columns = mean.shape
    maps = {"weight" + note: mean} | ({} if std is None else {"spread over tokens": std})
    width = min(max(2.6 + 0.42 * columns, 4.2), 10.0) * len(maps)
    figure = Figure(figsize=(width, min(max(1.6 + 0.24 * rows, 3.2), 16.0)), layout="constrained")
    figure.suptitle(title, fontsize=11, color=INK)
    for axes, (name, values) in zip(
        np.ravel(figure.subplots(1, len(maps))), maps.items(), strict=True
    ):
        image = colour_map(axes, values, "viridis", (0.0, None))
        axes.set(xlabel="source: block (0 is the embedding)", ylabel="read by sublayer", title=name)
        ticks(axes.xaxis, [str(i) for i in range(columns)])
        ticks(
            axes.yaxis,
            [*(f"{i} {'MLP' if i % 2 == 0 else 'attn'}" for i in range(1, rows)), "head"],
        )
        bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
        bar.outline.set_visible(False)
    return figure


def _depth_attention(step: int, arrays: Arrays) -> Figure | None:
    if "depth_weight_mean" not in arrays:
        return None
    mean, std = arrays["depth_weight_mean"], arrays.get("depth_weight_std")
    return weight_map(mean, f"Attention over depth, step {step:,}", std, ", mean over tokens")


def _magnitudes(history: Mapping[int, Arrays]) -> Figure | None:
    from matplotlib.figure import Figure

    step, arrays = list(history.items())[-1]
    panels = [
        ("output_rms", 1, "RMS", "Output of each sublayer"),
        ("stream_rms", 0, "RMS", "Stream after each sublayer: the open block, or the whole sum"),
        ("gradient_norm", 0, "norm", "Gradient of the parameters of embedding, sublayers, head"),
        ("output_gradient_rms", 1, "RMS", "Gradient of each sublayer's output"),
    ]
    panels = [panel for panel in panels if panel[0] in arrays]
    if not panels:
        return None
    figure = Figure(figsize=(8, 1.9 * len(panels) + 0.8), layout="constrained")
    figure.suptitle(f"Magnitudes over depth, step {step:,}", fontsize=11, color=INK)
    for axes, (key, first, unit, title) in zip(
        np.ravel(figure.subplots(len(panels), 1, sharex=True)), panels, strict=True
    ):
        over_depth(axes, history, key, first)
        axes.set(ylabel=unit, title=title)
        if "gradient" in key:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
    axes.set_xlabel("sublayer (odd: attention, even: MLP)")
    return figure


def _query_norms(history: Mapping[int, Arrays]) -> Figure | None:
    from matplotlib.figure import Figure

    step, arrays = list(history.items())[-1]
    if "query_norm" not in arrays:
        return None
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    over_depth(axes, history, "query_norm", 1)
    axes.set(
        xlabel="read before sublayer (the last one: of the output head)",
        ylabel="norm",
        title=f"Pseudo-queries, step {step:,}",
    )
    axes.set_ylim(bottom=0)
    return figure


def _expert_load(step: int, arrays: Arrays) -> Figure | None:
    from matplotlib.figure import Figure

    if "expert_load" not in arrays:
        return None
    load, layers = arrays["expert_load"], arrays["expert_layer"].astype(int)
    height = min(max(1.8 + 0.28 * len(layers), 3.2), 12.0)
    figure = Figure(figsize=(10, height), layout="constrained")
    figure.suptitle(f"Load of the experts, step {step:,}", fontsize=11, color=INK)
    left, right = figure.subplots(1, 2, width_ratios=[3, 1], sharey=True)
    image = colour_map(left, load, "PuOr_r", (0.0, 2.0))
    left.set(xlabel="expert", ylabel="decoder layer", title="load over the mean (1: even)")
    ticks(left.xaxis, [str(i) for i in range(load.shape[1])])
    bar = figure.colorbar(image, ax=left, shrink=0.8, pad=0.02, extend="max")
    bar.outline.set_visible(False)
    places = np.arange(len(layers))
    right.plot(arrays["expert_entropy"], places, "o-", color=COLOURS[0], label="entropy")
    right.plot(arrays["expert_violation"], places, "s--", color=COLOURS[1], label="violation")
    right.set(title="balance (even: 1 and 0)")
    ticks(left.yaxis, [str(i) for i in layers])
    right.set_xlim(left=0)
    right.grid()
    right.legend()
    return figure


def _block_store(step: int, arrays: Arrays) -> Figure | None:
    from matplotlib.figure import Figure

    if not np.any(arrays.get("store_blocks", 0)):
        return None
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    axes, blocks, memory = figure.subplots(), arrays["store_blocks"], arrays["store_bytes"]
    bars = axes.bar(np.arange(len(blocks)), blocks, width=0.6, color=COLOURS[0])
    if len(blocks) <= 32:
        axes.bar_label(bars, [in_bytes(each) for each in memory], color=INK, padding=2)
    axes.set(
        xlabel="pipeline rank", ylabel="blocks", title=f"Peak of the block store, step {step:,}"
    )
    axes.margins(y=0.15)
    ticks(axes.xaxis, [str(i) for i in range(len(blocks))])
    return figure
