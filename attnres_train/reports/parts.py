"""What of a run a page shows besides figures: pictures, texts, machine and configuration."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from attnres_train.config.yaml_text import flow
from attnres_train.observe import pictures as observations
from attnres_train.reports.reading import Run

_MOST_SAMPLES = 20  # of a run, the last ones
_DPI = 110
_TOLD = {
    "depth_attention": "Depth attention: how much each sublayer reads of each source",
    "magnitudes": "Size of outputs and of gradients, by block and sublayer",
    "query_norms": "Norms of the queries of depth attention, by sublayer",
    "expert_load": "Load of the experts, by layer",
    "block_store": "Blocks in store on each rank, at most",
}


def pictures(runs: Sequence[Run]) -> str:
    """The last pictures of each run that has some."""
    parts = []
    for run in runs:
        figures = "".join(_picture(run, name, png) for name, png in _drawn(run))
        if figures:
            parts.append(f'<h3>{escape(run.label)}</h3><div class="grid">{figures}</div>')
    return "".join(parts)


def _picture(run: Run, name: str, png: bytes) -> str:
    told = _TOLD.get(name, name.replace("_", " "))
    source = base64.b64encode(png).decode()
    return (
        f'<figure><div class="picture"><img alt="{escape(f"{run.label}. {told}")}" '
        f'src="data:image/png;base64,{source}"></div><figcaption>{escape(told)}</figcaption></figure>'
    )


def _drawn(run: Run) -> Iterator[tuple[str, bytes]]:
    """(name, PNG) of what the run has observed; nothing where it has not, or without matplotlib."""
    for name, figure in observations.pictures(run.folder).items():
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=_DPI)
        yield name, file.getvalue()


def samples(runs: Sequence[Run]) -> str:
    """Texts that the runs wrote on their way, the last first."""
    parts = []
    for run in runs:
        texts = [_sample(one) for one in reversed(run.samples[-_MOST_SAMPLES:])]
        newest = run.samples[-1]["step"] if run.samples else None
        first = sum(one["step"] == newest for one in run.samples[-_MOST_SAMPLES:])
        if texts:
            earlier = "".join(texts[first:])
            parts.append(f"<h3>{escape(run.label)}</h3>" + "".join(texts[:first]))
            if earlier:
                parts.append(f"<details><summary>Earlier</summary>{earlier}</details>")
    return "".join(parts)


def _sample(one: Mapping[str, Any]) -> str:
    prompt, text = escape(str(one["prompt"])), escape(str(one["text"]))
    return (
        f'<div class="sample"><p class="pale">step {escape(str(one["step"]))}</p>'
        f"<pre><b>{prompt}</b>{text}</pre></div>"
    )


def environment(runs: Sequence[Run]) -> str:
    """Where each run ran, of what code, with which packages: of its last start."""
    columns = [dict(_flat(run.environment)) | dict(_flat(run.info)) for run in runs]
    keys = dict.fromkeys(key for column in columns for key in column)
    if not keys:
        return ""
    head = "".join(f'<th scope="col">{escape(run.label)}</th>' for run in runs)
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th>'
        + "".join(f"<td>{escape(column.get(key, ''))}</td>" for column in columns)
        + "</tr>"
        for key in keys
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Environment">'
        f'<table class="keys"><thead><tr><th scope="col">key</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield prefix + key, " ".join(map(str, value))
        elif value is not None:
            yield prefix + key, value if isinstance(value, str) else flow(value)


def configurations(runs: Sequence[Run]) -> str:
    """Each as its run folder has it, folded."""
    parts = []
    for run in runs:
        file = run.folder / "config.yaml"
        if file.is_file():
            text = escape(file.read_text(encoding="utf-8", errors="replace"))
            parts.append(
                f"<details><summary>{escape(run.label)}</summary><pre>{text}</pre></details>"
            )
    return "".join(parts)
