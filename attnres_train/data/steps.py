"""The steps of `prepare`: tokenizer, token shards, sample indices. Each leaves its result in the
cache under a name made from all it depends on, and does nothing when that is there."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from attnres_train.config.schema import RunConfig
from attnres_train.data.cache import digest, published, write_json
from attnres_train.data.corpora import Corpus
from attnres_train.data.indexed import check_indexed
from attnres_train.data.samples import Source, build_indices
from attnres_train.data.shards import shard_prefixes, tokenise
from attnres_train.data.tokenizer import Tokenizer, train_bpe
from attnres_train.data.unigrams import unigram_entropy
from attnres_train.errors import UserError

# Raised when the files in the cache change their meaning: old ones are then no longer found.
CACHE_VERSION = 1
# Text that a BPE is trained on, at most: random files of every corpus by weight. More costs time
# and hardly changes a vocabulary of thousands.
BPE_SAMPLE_CHARS = 16 << 20


@dataclass(frozen=True)
class Desk:
    """Where the steps work, and whether they tell about it."""

    cache: Path
    say: Callable[[str], None]
    progress: bool


def make_tokenizer(config: RunConfig, corpora: list[Corpus], desk: Desk) -> Tokenizer | None:
    """Train or load the tokenizer; None for ``data.tokenizer.kind: none``.

    Raises UserError when it has more tokens than the model has embeddings.
    """
    settings, limit = config.data.tokenizer, config.model.vocab_size
    if settings.kind == "none":
        return None
    if settings.kind == "bpe":
        check_vocab_size("data.tokenizer.vocab_size is", settings.vocab_size, limit)
        path = _trained_bpe(settings.vocab_size, corpora, desk)
    else:
        path = Path(settings.path or "")
        if not path.is_file():
            raise UserError(f"data.tokenizer.path: there is no file {settings.path}")
    tokenizer = Tokenizer(path, settings)
    check_vocab_size(f"data.tokenizer.path {path} has a vocabulary of", tokenizer.vocab_size, limit)
    return tokenizer


def check_vocab_size(told: str, vocab_size: int, limit: int) -> None:
    if vocab_size > limit:
        raise UserError(
            f"{told} {vocab_size}, but model.vocab_size is {limit}: raise model.vocab_size to at "
            f"least {vocab_size}"
        )


def _trained_bpe(vocab_size: int, corpora: list[Corpus], desk: Desk) -> Path:
    """The ``tokenizer.json`` of a BPE trained on the corpora."""
    corpora = [corpus for corpus in corpora if corpus.config.kind != "indexed"]
    if not corpora:
        raise UserError(
            "data.tokenizer.kind is bpe, but every corpus is indexed, which holds no text to train "
            "it on: name the tokenizer that made them (kind file or tiktoken), or kind none"
        )
    content = [[corpus.fingerprint(), corpus.config.weight] for corpus in corpora]
    key = digest([CACHE_VERSION, vocab_size, BPE_SAMPLE_CHARS, content])
    folder = desk.cache / "tokenizers" / key
    if not folder.is_dir():
        desk.say(f"training a byte-level BPE of {vocab_size:,} tokens")
        started = time.perf_counter()
        with published(folder) as scratch:
            train_bpe(_bpe_sample(corpora), vocab_size, scratch / "tokenizer.json")
        desk.say(f"trained {folder} in {time.perf_counter() - started:.1f} s")
    return folder / "tokenizer.json"


def _bpe_sample(corpora: list[Corpus]) -> Iterator[str]:
    total = sum(corpus.config.weight for corpus in corpora)
    for corpus in corpora:
        left = BPE_SAMPLE_CHARS * corpus.config.weight / total
        files = random.Random(0).sample(corpus.files, len(corpus.files))
        passages = (passage for file in files for passage in corpus.passages(file))
        for passage in passages:
            if left <= 0:
                break
            yield passage.text
            left -= len(passage.text)


def make_source(corpus: Corpus, tokenizer: Tokenizer | None, desk: Desk) -> Source:
    """Tokenise a corpus of text; check the files of an indexed one.

    Raises UserError when files are damaged, or hold no text.
    """
    indexed = corpus.config.kind == "indexed"
    if not indexed and tokenizer is None:
        raise UserError(
            f"data.tokenizer.kind is none, but {corpus.key} is {corpus.config.kind}: only an "
            "indexed corpus needs no tokenizer"
        )
    made_by = None if indexed else [tokenizer.digest, tokenizer.eod]
    key = digest([CACHE_VERSION, corpus.fingerprint(), made_by])
    if indexed:
        prefixes = corpus.prefixes
        num_tokens = sum(check_indexed(prefix).num_tokens for prefix in prefixes)
        if not num_tokens:
            raise UserError(f"{corpus.key} ({corpus.name}) is empty: its files hold no token")
        told = f"{num_tokens:,} tokens"
    else:
        folder = desk.cache / "shards" / key
        counts = tokenise(corpus, tokenizer, folder, progress=desk.progress)
        prefixes = shard_prefixes(folder)
        told = f"{counts.tokens:,} tokens in {counts.documents:,} documents"
        if counts.empty_documents:
            told += f" ({counts.empty_documents:,} empty ones skipped)"
    desk.say(f"{corpus.name}: {told}")
    return Source(corpus.key, corpus.name, key, corpus.config.weight, prefixes)


def make_indices(config: RunConfig, sources: list[Source], desk: Desk) -> tuple[Path, dict]:
    """Index the samples of every source: the folder, and a summary with lists ``train_tokens``,
    ``valid_tokens`` and ``train_samples`` (one entry per source) and ``unigram_entropy_nats``.
    """
    content = [[source.digest, source.weight] for source in sources]
    sizes = [config.run.seed, config.train.seq_length, config.model.vocab_size, config.data.split]
    folder = desk.cache / "indices" / digest([CACHE_VERSION, content, sizes])
    if not folder.is_dir():
        desk.say("indexing samples")
        with published(folder) as scratch:
            built = [
                build_indices(source, number, config, scratch)
                for number, source in enumerate(sources)
            ]
            weights = [source.weight for source in sources]
            summary = {
                "train_tokens": [one.train_tokens for one in built],
                "valid_tokens": [one.valid_tokens for one in built],
                "train_samples": [one.train_samples for one in built],
                "unigram_entropy_nats": unigram_entropy([one.unigrams for one in built], weights),
            }
            write_json(scratch / "summary.json", summary)
    return folder, json.loads((folder / "summary.json").read_text(encoding="utf-8"))
