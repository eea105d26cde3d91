"""The samples that a model is evaluated on: what its run holds out, or other data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnres_train.config import load_config
from attnres_train.config.loader import config_of, plain_values
from attnres_train.config.schema import RunConfig
from attnres_train.config.tree import Tree
from attnres_train.data.corpora.reader import find_corpora
from attnres_train.data.generations import Part, RunData
from attnres_train.data.loader import Batch, BatchSource, open_data
from attnres_train.data.prepare import Prepared, prepare
from attnres_train.data.tokenizers.tokenizer import Tokenizer
from attnres_train.errors import UserError

_MAY_CHANGE = ("data.", "train.seq_length")


@dataclass(frozen=True)
class EvaluationSamples:
    """Samples by number, of which ``row(number)`` is one (`data.samples.open_samples`)."""

    data: BatchSource
    numbers: Sequence[int]
    row: Callable[[int], dict[str, Any]]
    corpus: Callable[[int], int]
    """The number of the corpus of a sample."""
    names: dict[int, str]
    """Key and name of each corpus."""
    length: int
    """Tokens of a sample."""

    def batch(self, numbers: Sequence[int]) -> Batch:
        return self.data.collate([self.row(number) for number in numbers], "the evaluation")


def held_out(
    config: RunConfig, tokenizer: Tokenizer | None, batches: int | None
) -> EvaluationSamples:
    """The first ``batches`` batches of ``train.global_batch_size`` samples that validation in
    training takes (None: as many as there), in its order.

    Raises UserError where nothing is held out.
    """
    if not config.train.eval_interval:
        raise UserError(
            "train.eval_interval of the run is 0, so that nothing is held out: name other data "
            "with --data"
        )
    config.train.eval_iters = batches or config.train.eval_iters
    prepared = _prepare(config, tokenizer)
    data = open_data(config, prepared)
    validating = [source for source in prepared.sources if source.validates]
    names = {number: f"{one.key} ({one.name})" for number, one in enumerate(validating)}
    size = config.train.eval_iters * config.train.global_batch_size
    samples = data.valid

    def corpus(number: int) -> int:
        return samples.corpus(number) if len(validating) > 1 else 0

    return EvaluationSamples(
        data, range(size), lambda n: samples[n], corpus, names, config.train.seq_length
    )


def other_data(
    config: RunConfig, tokenizer: Tokenizer | None, batches: int | None
) -> EvaluationSamples:
    """The samples of each corpus of ``config``, from the first to the last (or of the first
    ``batches`` batches): windows of ``train.seq_length`` + 1 tokens, whose rest is left out."""
    config.train.eval_interval = 0  # nothing is held out: all of it is there
    config.train.train_iters = 1
    prepared = _prepare(config, tokenizer)
    data = open_data(config, prepared)
    corpora = getattr(data.train, "datasets", [data.train])
    most = batches * config.train.global_batch_size if batches else None
    sizes = [len(range(one.samples_per_epoch)[:most]) for one in corpora]
    places = [(corpus, place) for corpus, size in enumerate(sizes) for place in range(size)]
    names = {number: f"{one.key} ({one.name})" for number, one in enumerate(prepared.sources)}

    def row(number: int) -> dict[str, Any]:
        corpus, place = places[number]
        return corpora[corpus][place]

    return EvaluationSamples(
        data,
        range(len(places)),
        row,
        lambda number: places[number][0],
        names,
        config.train.seq_length,
    )


def with_data(config: RunConfig, words: Sequence[str]) -> RunConfig:
    """``config`` of a run with the data that ``words`` name: KEY=VALUE of the data section, or a
    configuration file whose corpora are taken.

    Raises UserError for other keys.
    """
    files, overrides = [w for w in words if "=" not in w], [w for w in words if "=" in w]
    for text in overrides:
        if not text.startswith(_MAY_CHANGE):
            raise UserError(
                f"--data {text}: only keys of data and train.seq_length are for an evaluation"
            )
    if len(files) > 1:
        raise UserError(f"--data: one configuration file, not {' and '.join(files)}")
    values = plain_values(config)
    values["stages"] = []
    if files:
        named = load_config(files[0]).data
        own = values["data"]["tokenizer"]
        values["data"] = named.model_dump(mode="json") | {"tokenizer": own}
    tree = Tree(values, {(): "the configuration of the run"})
    return config_of(tree, overrides)


def _prepare(config: RunConfig, tokenizer: Tokenizer | None) -> Prepared:
    """What `prepare` makes of the corpora, with the tokens of the model."""
    file: Path | None = tokenizer.path if tokenizer else None
    section = config.data.tokenizer
    if tokenizer and section.path is not None:  # it may lie elsewhere by now
        section.path, section.eod = str(file), tokenizer.eod
    parts = [[Part(0, reader)] for reader in find_corpora(config.data)]
    return prepare(config, run=RunData(parts, file))
