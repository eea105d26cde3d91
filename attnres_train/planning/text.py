"""The report of `attnres-train plan` as tables (see `planner.Planner.report` for its keys)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_SHOWN_ROWS = 40  # of ranks and hops; --json has all


def as_text(report: dict) -> str:
    """The whole report, one titled table after the other."""
    parts = (_head, _ranks, _memory, _hops, _units, _experts, _schedules, _steps)
    return "\n\n".join(filter(None, (part(report) for part in parts)))


def _head(report: dict) -> str:
    ranks, virtual = report["pipeline_ranks"], report["virtual_stages"]
    told = f"\nStages are idle for {report['imbalance']}." if report["imbalance"] else ""
    return (
        f"{report['run']}: residual {report['residual']}, {ranks} pipeline ranks x {virtual} "
        f"virtual stages, {report['micro_batches']} micro-batches per step\n"
        f"One unit (a block or partial of a micro-batch) is {bytes_text(report['unit_bytes'])}."
        f"{told}"
    )


def _ranks(report: dict) -> str:
    mean = sum(rank["flops"] for rank in report["ranks"]) / len(report["ranks"])
    rows = [
        (
            rank["rank"],
            ", ".join(_span(*span) for span in rank["layers"]),
            f"{rank['parameters']:,}",
            f"{rank['flops'] / 1e12:.3g}",
            f"{rank['flops'] / mean:.1%}",
        )
        for rank in report["ranks"]
    ]
    header = ("rank", "layers of its chunks", "parameters", "TFLOP", "of mean")
    return table("Ranks (FLOPs of a micro-batch, forward and backward)", header, rows)


def _memory(report: dict) -> str:
    parts = ("parameters", "gradients", "optimizer", "activations", "block_store", "total")
    rows = [
        (rank["rank"], *(bytes_text(rank["memory"][part]) for part in parts), blocks, partials)
        for rank, blocks, partials in zip(
            report["ranks"], report["peak_blocks"], report["peak_partials"], strict=True
        )
    ]
    header = ("rank", *(part.replace("_", " ") for part in parts), "blocks", "partials")
    return table("Memory (activations are estimated; blocks stored at the peak)", header, rows)


def _hops(report: dict) -> str:
    rows = [
        (
            f"{hop['src_chunk']} -> {hop['dst_chunk']}",
            f"{hop['src_rank']} -> {hop['dst_rank']}",
            _span_of(hop["held"]),
            _span_of(hop["fresh"]),
            "partial" if hop["partial"] else "-",
            bytes_text(hop["bytes"]) if hop["bytes"] else "local",
        )
        for hop in report["hops"]
    ]
    if not rows:
        return "Hops: none, one chunk"
    header = ("chunks", "ranks", "held", "fresh", "open block", "bytes")
    return table("Hops (blocks per micro-batch; gradients go the same way back)", header, rows)


def _units(report: dict) -> str:
    labels = {
        "standard": "standard residual stream",
        "naive": "full history on every hop",
        "padded": "exact, padded to the widest hop",
        "paper": "paper, Eq. 8 (no embedding, no partials)",
        "exact": "exact: this plan",
        "bound": "lower bound",
    }
    directions = 2 * report["micro_batches"] * report["unit_bytes"]
    rows = [
        (label, f"{report['units'][name]:g}", bytes_text(report["units"][name] * directions))
        for name, label in labels.items()
    ]
    header = ("transport", "units", "per step")
    return table("Traffic (units per micro-batch and direction)", header, rows, left=1)


def _experts(report: dict) -> str:
    one, micro_batches = report["experts"], report["micro_batches"]
    if one["ranks"] == 1:
        return ""
    layer = one["forward"] + one["backward"]
    # Of the pipeline rank that sends most.
    step = max(rank["exchange_bytes"] for rank in report["ranks"]) * micro_batches
    rows = [
        ("exact: a token once per rank", bytes_text(layer), bytes_text(step)),
        (
            "a token once per expert",
            bytes_text(one["per_pair"]),
            bytes_text(step * one["per_pair"] / layer),
        ),
    ]
    title = (
        f"Experts ({one['experts_per_rank']} per rank and layer, {one['ranks']} ranks; a token "
        f"goes to {one['ranks_per_token']:.3g} others; even load, bytes that a rank sends)"
    )
    return table(title, ("exchange", "layer and micro-batch", "per step"), rows, left=1)


def _schedules(report: dict) -> str:
    rows = [
        (
            name,
            f"{one['bubble']:.1%}",
            one["peak_blocks"],
            bytes_text(one["activations"]),
            bytes_text(one["memory"]),
        )
        for name, one in report["schedules"].items()
    ]
    header = ("schedule", "bubble", "blocks", "activations", "memory")
    return table("Schedules (bubble without communication; largest rank)", header, rows, left=1)


def _steps(report: dict) -> str:
    machine = report["machine"]
    rows = [
        (
            mode,
            f"{step['seconds']:.4g} s",
            f"{step['over_standard']:+.1%}",
            f"{step['bubble']:.1%}",
            f"{step['mfu']:.1%}",
        )
        for mode, step in report["steps"].items()
    ]
    title = (
        f"Simulated step ({machine['flops_rate'] / 1e12:g} TFLOP/s in passes, "
        f"{machine['link_bandwidth'] / 1e9:g} GB/s per rank, MFU of "
        f"{machine['peak_flops'] / 1e12:g} TFLOP/s)"
    )
    header = ("transport", "step", "to standard", "idle", "MFU")
    return table(title, header, rows, left=1)


def table(
    title: str, header: Sequence, rows: Iterable[Sequence], left: int = 0, last_left: bool = False
) -> str:
    """Columns aligned right, the first ``left`` of them, and with ``last_left`` the last, left."""
    rows = list(rows)
    at_left = {*range(left), *([len(header) - 1] if last_left else [])}
    shown = [header, *rows[:_SHOWN_ROWS]]
    cells = [[str(cell) for cell in row] for row in shown]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if index in at_left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    if len(rows) > _SHOWN_ROWS:
        lines.append(f"... {len(rows) - _SHOWN_ROWS} more: --json has all")
    return "\n".join([title, *(f"  {line}" for line in lines)])


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _span_of(blocks: Sequence[int]) -> str:
    """Payloads are runs of consecutive blocks."""
    return _span(blocks[0], blocks[-1]) if blocks else "-"


def bytes_text(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
