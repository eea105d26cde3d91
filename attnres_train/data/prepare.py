"""What is done to data once, before training: find it, tokenise it, index its samples. The result
lies in `data.cache_dir`, where later runs find it; workers are told where (`Prepared`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from attnres_train.config.schema import RunConfig
from attnres_train.data.cache import locked
from attnres_train.data.corpora.reader import find_corpora
from attnres_train.data.generations import Part, RunData
from attnres_train.data.held_out import Cut
from attnres_train.data.samples import Source
from attnres_train.data.steps import (
    Desk,
    make_indices,
    make_sources,
    make_token_bytes,
    make_tokenizer,
)
from attnres_train.data.tokenizers.kind import tokenizer_kind
from attnres_train.data.tokenizers.tokenizer import Tokenizer
from attnres_train.errors import UserError
from attnres_train.screen import complain


@dataclass(frozen=True)
class Prepared:
    """Where the data of a run lies on this machine, and what it holds."""

    tokenizer_path: str | None
    """The file that it is opened with, if any (`open_tokenizer`)."""
    sources: list[Source]
    indices: str
    """Folder of the sample indices."""
    num_tokens: int
    """Training tokens of one epoch of every corpus."""
    num_valid_tokens: int
    unigram_entropy_nats: float
    """Entropy of the training tokens' distribution (`unigrams.unigram_entropy`), nats per token."""
    eod: int | None
    """Id of the token that ends a document; None: unknown, and not needed."""
    token_bytes: str | None = None
    """The file of the bytes of each token (`data.token_bytes`); None where they are not known."""

    @property
    def bytes_per_token(self) -> float | None:
        """Of the corpora as they were tokenised, ends of documents left out; None: not counted."""
        every = [one for source in self.sources for one in source.generations if one.text_bytes]
        if not every:
            return None
        return sum(one.text_bytes for one in every) / sum(one.text_tokens for one in every)


def prepare(config: RunConfig, *, progress: bool = True, run: RunData | None = None) -> Prepared:
    """Build what `open_data` reads, or find it built; ``progress`` tells about it on stderr. Where
    all is there, the cache is neither locked nor written to. ``run`` is what a run has that goes
    on; None: a new one.

    Call it once on a machine, before workers start and before torch.distributed is initialised, and
    hand what it returns to all that read the data. Runs that start together wait for each other.
    Raises UserError for data that is missing, damaged, too small or outside the model's vocabulary.
    """
    say: Callable[[str], None] = _say if progress else lambda line: None
    cache = Path(config.data.cache_dir)
    if run is None:
        run = RunData([[Part(0, reader)] for reader in find_corpora(config.data)])
    corpora = [generations[0].reader for generations in run.corpora]
    for note in (note for corpus in corpora for note in corpus.notes):
        say(note)
    with ExitStack() as held:
        lock = lru_cache(lambda: held.enter_context(locked(cache, say)))  # once
        desk = Desk(cache, say, progress, lock)
        tokenizer = make_tokenizer(config, corpora, desk, run.tokenizer)
        eod = _end_of_document(config, tokenizer)
        sources = [make_sources(generations, tokenizer, desk) for generations in run.corpora]
        bytes_of_tokens = make_token_bytes(config, tokenizer, sources, desk)
        indices, summary = make_indices(config, sources, desk)
    found = summary["sources"]
    sources = [replace(s, **_validation(one)) for s, one in zip(sources, found, strict=True)]
    _check_validation(config, sources, found)
    prepared = Prepared(
        tokenizer_path=str(tokenizer.path) if tokenizer and tokenizer.path else None,
        sources=sources,
        indices=str(indices),
        num_tokens=sum(one["train_tokens"] for one in found),
        num_valid_tokens=sum(one["valid_tokens"] for one in found),
        unigram_entropy_nats=summary["unigram_entropy_nats"],
        eod=eod,
        token_bytes=str(bytes_of_tokens) if bytes_of_tokens else None,
    )
    if config.train.eval_interval:
        for source, one in zip(sources, found, strict=True):
            say(f"{source.key}: {_held_out(one)}")
    _tell_epochs(config, sources, [one["train_samples"] for one in found], desk)
    desk.say(
        f"{prepared.num_tokens:,} training tokens; unigram entropy "
        f"{prepared.unigram_entropy_nats:.3f} nats, ln model.vocab_size "
        f"{math.log(config.model.vocab_size):.3f}"
    )
    return prepared


def check_alike(by_machine: Mapping[str, Prepared]) -> None:
    """Check that the machines of a run have prepared the same data.

    Raises UserError naming two machines that have not, and what differs.
    """
    (first, wanted), *others = by_machine.items()
    for name, found in others:
        keys = [
            mine.key
            for mine, theirs in zip(wanted.sources, found.sources, strict=True)
            if _content(mine) != _content(theirs)
        ]
        if keys or found.eod != wanted.eod:
            what = " and ".join(keys) or "the end of a document"
            raise UserError(
                f"machine {name} has other data than machine {first}: {what} differs in files or "
                "tokenizer. Give all machines the same files"
            )


def _content(source: Source) -> list[tuple[int, str]]:
    return [(one.start, one.content) for one in source.generations]


def open_tokenizer(config: RunConfig, prepared: Prepared) -> Tokenizer | None:
    """The run's tokenizer; None for a kind that encodes no text (``none``).

    Raises UserError where its file is gone or broken.
    """
    settings, path = config.data.tokenizer, prepared.tokenizer_path
    if not tokenizer_kind(settings).encodes_text:
        return None
    return Tokenizer(Path(path) if path else None, settings)


def _end_of_document(config: RunConfig, tokenizer: Tokenizer | None) -> int | None:
    """Id of the token that ends a document; None where nothing tells it and nothing needs it."""
    if tokenizer is not None:
        return tokenizer.eod
    data, eod = config.data, config.data.tokenizer.eod
    if isinstance(eod, int) and 0 <= eod < config.model.vocab_size:
        return eod
    if data.tells_documents_apart:
        asked = "reset_at_documents" if data.reset_at_documents else "mask_document_ends"
        found = "not set" if eod is None else f"{eod!r}, no id below model.vocab_size"
        raise UserError(
            f"data.{asked} needs the token that ends a document, which nothing tells where "
            f"data.tokenizer.kind is {data.tokenizer.kind} and data.tokenizer.eod is {found}: set "
            "it to the id that ends the documents of the indexed corpora"
        )
    return None


def _validation(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a `Source` says of it, from its `SourceSummary` in JSON."""
    cut = summary["cut"]
    return {"validates": summary["valid_tokens"] > 0, "cut": Cut(**cut) if cut else None}


def _check_validation(
    config: RunConfig, sources: list[Source], summaries: list[dict[str, Any]]
) -> None:
    """Raise UserError where there is to be validation, and no corpus that it can be of."""
    if not config.train.eval_interval or any(source.validates for source in sources):
        return
    needed = config.train.seq_length + 1
    sizes = ", ".join(
        f"{source.key} ({source.name}) has {one['train_tokens']:,} training tokens in "
        f"{one['documents']:,} documents"
        for source, one in zip(sources, summaries, strict=True)
    )
    raise UserError(
        f"train.eval_interval is {config.train.eval_interval}, but no corpus is large enough to "
        f"validate on: of one, the longest document must leave a sample of train.seq_length + 1 = "
        f"{needed} tokens to training and lend one to validation, and {sizes}. Bring more text, "
        "lower train.seq_length, or set train.eval_interval to 0"
    )


def _held_out(summary: Mapping[str, Any]) -> str:
    """What is held out of a corpus."""
    held, documents, lent = (summary[key] for key in ("held_out", "documents", "lent_tokens"))
    if not summary["valid_tokens"]:
        left = "left out of validation: too small to hold out a sample and keep one for training"
        return f"{left}; {held:,} of {documents:,} documents are held out, unused" if held else left
    share = summary["valid_tokens"] / (summary["valid_tokens"] + summary["train_tokens"])
    told = f"{held:,} of {documents:,} documents held out"
    if lent:
        told += (
            f", too few for a sample: so are the last {lent:,} tokens of the longest of the others"
        )
    return f"{told} ({100 * share:.1f} % of its tokens)"


def _tell_epochs(
    config: RunConfig, sources: list[Source], samples_per_epoch: list[int], desk: Desk
) -> None:
    total_weight = sum(source.weight for source in sources)
    total = config.train.train_iters * config.train.global_batch_size
    for source, per_epoch in zip(sources, samples_per_epoch, strict=True):
        taken = total * source.weight / total_weight
        desk.say(
            f"{source.name}: {per_epoch:,} samples an epoch, the run takes {taken:,.0f} "
            f"({taken / per_epoch:.2f} epochs)"
        )


def _say(line: str) -> None:
    complain(f"data: {line}")
