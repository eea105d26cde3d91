"""`attnres-train eval RUN`: loss, perplexity and bits per byte of a trained model, by corpus and by
position in the sequence."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

from tqdm import tqdm

from attnres_train.commands.output import show
from attnres_train.errors import UserError
from attnres_train.evaluation.evaluate import Evaluation, evaluate
from attnres_train.evaluation.figures import Figures
from attnres_train.evaluation.samples import EvaluationSamples, held_out, other_data, with_data
from attnres_train.inference.opening import Opened, open_model
from attnres_train.screen import Forgiving

_COLUMNS = ("", "sequences", "tokens", "loss", "perplexity", "bits per byte", "accuracy")


def run(args: argparse.Namespace) -> int:
    if args.batches is not None and args.batches < 1:
        raise UserError(f"--batches is {args.batches}: it must be 1 or more")
    opened = open_model(args.run_folder, args.device)
    samples = find_samples(opened, args.data, args.batches)
    with tqdm(
        total=len(samples.numbers),
        unit="sample",
        leave=False,
        disable=None,
        file=Forgiving(sys.stderr),
    ) as bar:

        def told(sequences: int) -> None:
            bar.update(sequences)

        found = evaluate(opened.chunk, samples, opened.config.train.micro_batch_size, told)
    if args.json:
        show(json.dumps(as_json(opened, args.data, found), indent=2))
    else:
        show("\n".join(as_text(opened, args.data, found)))
    return 0


def find_samples(opened: Opened, words: list[str], batches: int | None) -> EvaluationSamples:
    """Those of the data that ``words`` name, or what the run holds out."""
    if not words:
        return held_out(opened.config, opened.tokenizer, batches)
    return other_data(with_data(opened.config, words), opened.tokenizer, batches)


def as_json(opened: Opened, words: list[str], found: Evaluation) -> dict:
    return {
        "checkpoint": str(opened.path),
        "step": opened.step,
        "data": " ".join(words) or "held out",
        **found.whole.plain(),
        "corpora": {name: figures.plain() for name, figures in found.corpora.items()},
        "positions": [
            {"from": start, "to": stop, **figures.plain()}
            for (start, stop), figures in found.positions.items()
        ],
    }


def as_text(opened: Opened, words: list[str], found: Evaluation) -> Iterator[str]:
    """A table; +- is a standard error over sequences."""
    yield f"{opened.path}, step {opened.step}, on {' '.join(words) or 'what the run holds out'}"
    rows = [_COLUMNS, _row("all", found.whole)]
    if len(found.corpora) > 1:
        rows += [_row(name, figures) for name, figures in found.corpora.items()]
    rows += [
        _row(f"positions {start} to {stop - 1}", figures)
        for (start, stop), figures in found.positions.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    for first, *others in rows:
        cells = (text.rjust(width) for text, width in zip(others, widths[1:], strict=True))
        yield "  ".join([first.ljust(widths[0]), *cells]).rstrip()
    if found.whole.bits_per_byte is None:
        yield "no bits per byte: how many bytes tokens stand for is not known (docs/evaluation.md)"


def _row(name: str, figures: Figures) -> tuple[str, ...]:
    return (
        name,
        f"{figures.sequences:,}",
        f"{figures.tokens:,}",
        _with_error(figures.loss, figures.loss_error),
        _with_error(figures.perplexity, figures.perplexity_error),
        _with_error(figures.bits_per_byte, figures.bits_per_byte_error),
        f"{100 * figures.accuracy:.1f} %",
    )


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if error is None else f"{value:.4f} +- {error:.4f}"
