"""The steps of `prepare`: tokenizer, token shards, sample indices. Each leaves its result in the
cache under a name made from all it depends on, and does nothing when that is there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from attnres_train.config.schema import RunConfig
from attnres_train.data.cache import digest, published, write_json
from attnres_train.data.corpora.content import digest_of
from attnres_train.data.corpora.reader import CorpusReader
from attnres_train.data.generations import Part
from attnres_train.data.held_out import held_out_share
from attnres_train.data.indexed import check_indexed
from attnres_train.data.own_code import errors_of, interruptible
from attnres_train.data.samples import Source, build_indices, together
from attnres_train.data.shard_writer import SEQUENCE_TOKENS, Counts
from attnres_train.data.shards import shard_prefixes, text_hashes, tokenise
from attnres_train.data.token_bytes import token_bytes
from attnres_train.data.token_range import check_vocabulary, token_hashes
from attnres_train.data.tokenizer_sample import EXCERPT_BYTES, SAMPLE_BYTES, sample
from attnres_train.data.tokenizers.kind import TokenizerKind, tokenizer_kind, too_many_tokens
from attnres_train.data.tokenizers.tokenizer import Tokenizer
from attnres_train.data.unigrams import unigram_entropy
from attnres_train.errors import UserError

# Raised when the files in the cache change their meaning: old ones are then no longer found. Where
# samples change, raise `samples.SAMPLES_VERSION` too.
CACHE_VERSION = 3
# Share of a text that is not worth a warning.
MOST_WITHOUT_TOKEN = 1e-3
TRAINED_FILE = "tokenizer.json"
BYTES_FILE = "bytes.npy"


@dataclass(frozen=True)
class Desk:
    """Where the steps work, and whether they tell about it."""

    cache: Path
    say: Callable[[str], None]
    progress: bool
    lock: Callable[[], None]
    """Waits for whoever writes to the cache, and holds it until all steps are done. For a step
    before it writes: one that finds its result needs neither lock nor a cache to write to."""

    def make(self, folder: Path, build: Callable[[Path], None]) -> None:
        """Have ``build(scratch)`` fill ``folder``, if it is not there."""
        if folder.is_dir():
            return
        self.lock()
        if folder.is_dir():
            return  # made by the run that was waited for
        with published(folder) as scratch:
            build(scratch)


def make_tokenizer(
    config: RunConfig, corpora: Sequence[CorpusReader], desk: Desk, trained: Path | None = None
) -> Tokenizer | None:
    """Train or open the tokenizer; None for a kind that encodes no text. ``trained`` is the file of
    one that the run has trained.

    Raises UserError when it has more tokens than the model has embeddings.
    """
    settings, limit = config.data.tokenizer, config.model.vocab_size
    kind = tokenizer_kind(settings)
    if not kind.encodes_text:
        return None
    if kind.reads_vocab_size:
        check_vocab_size("data.tokenizer.vocab_size is", settings.vocab_size, limit)
    file = trained if kind.trains_on_corpora else None
    tokenizer = Tokenizer(file or _tokenizer_file(kind, corpora, desk), settings)
    named = "path" if tokenizer.path else "kind"
    told = f"data.tokenizer.{named} {tokenizer.source} has a vocabulary of"
    check_vocab_size(told, tokenizer.vocab_size, limit)
    return tokenizer


def check_vocab_size(told: str, vocab_size: int, limit: int) -> None:
    if vocab_size > limit:
        raise UserError(too_many_tokens(told, vocab_size, limit))


def _tokenizer_file(
    kind: TokenizerKind, corpora: Sequence[CorpusReader], desk: Desk
) -> Path | None:
    """The file that ``kind`` is opened with, trained or the user's; None where it needs none."""
    if kind.trains_on_corpora:
        return _trained(kind, corpora, desk)
    if not kind.needs_path:
        return None
    for problem in kind.check_files():
        raise UserError(problem)
    return kind.file(Path(kind.section.path or ""))


def _trained(kind: TokenizerKind, corpora: Sequence[CorpusReader], desk: Desk) -> Path:
    """The file of a tokenizer that is trained on the corpora."""
    texts = [corpus for corpus in corpora if not corpus.holds_tokens]
    if not texts:
        held = " or ".join(sorted({corpus.kind for corpus in corpora}))
        raise UserError(
            f"data.tokenizer.kind is {kind.kind}, but every corpus is {held}, which holds no text "
            "to train it on: name the tokenizer that made them (kind file or tiktoken), or kind "
            "none"
        )
    content = [[corpus.fingerprint(), corpus.section.weight] for corpus in texts]
    asked = [kind.section.vocab_size, SAMPLE_BYTES, EXCERPT_BYTES, content]
    key = digest([CACHE_VERSION, kind.kind, *asked, *kind.fingerprint()])
    folder = desk.cache / "tokenizers" / key

    def build(scratch: Path) -> None:
        desk.say(f"training {kind.name}")
        started = time.perf_counter()
        with errors_of(kind, "training"):
            interruptible(lambda: kind.train(sample(texts), scratch / TRAINED_FILE))
        for corpus in texts:
            corpus.check_unchanged(corpus.files)
        desk.say(f"trained {folder} in {time.perf_counter() - started:.1f} s")

    desk.make(folder, build)
    return folder / TRAINED_FILE


def make_sources(generations: Sequence[Part], tokenizer: Tokenizer | None, desk: Desk) -> Source:
    """`make_source` of the ``generations`` of a corpus: the first, with the others in it."""
    first, *later = (
        replace(make_source(part.reader, tokenizer, desk), start=part.start) for part in generations
    )
    return replace(first, later=tuple(later))


def make_source(corpus: CorpusReader, tokenizer: Tokenizer | None, desk: Desk) -> Source:
    """Tokenise a corpus of text; check the files of one that holds tokens.

    Raises UserError when files are damaged, or hold no text.
    """
    made_by = None
    if not (corpus.holds_tokens or tokenizer is None):
        made_by = [tokenizer.digest, tokenizer.eod]
    key = digest([CACHE_VERSION, corpus.fingerprint(), made_by])
    if corpus.holds_tokens:
        prefixes = corpus.prefixes()
        num_tokens = sum(check_indexed(prefix).num_tokens for prefix in prefixes)
        if not num_tokens:
            raise UserError(f"{corpus.key} ({corpus.name}) is empty: its files hold no token")
        told, counts = f"{num_tokens:,} tokens", Counts()
    elif tokenizer is None:
        raise UserError(
            f"data.tokenizer.kind is none, but {corpus.key} is {corpus.kind}: only an "
            "indexed corpus needs no tokenizer"
        )
    else:
        folder = desk.cache / "shards" / key
        counts = tokenise(
            corpus, tokenizer, folder, progress=desk.progress, before_writing=desk.lock
        )
        prefixes = shard_prefixes(folder)
        told = f"{counts.tokens:,} tokens in {counts.documents:,} documents"
        if counts.empty_documents:
            told += f" ({counts.empty_documents:,} empty ones skipped)"
        if counts.cut_documents:
            told += (
                f" ({counts.cut_documents:,} longer than {SEQUENCE_TOKENS:,} tokens, cut there and "
                "shuffled apart)"
            )
        told += "".join(_without_token(counts, tokenizer))
    desk.say(f"{corpus.name}: {told}")
    return Source(
        corpus.key,
        corpus.name,
        key,
        corpus.section.weight,
        prefixes,
        content=digest([corpus.identity(), made_by]),
        hashes_text=not corpus.holds_tokens,
        files=digest_of(corpus.rows),
        num_files=len(corpus.rows),
        text_bytes=counts.text_bytes,
        text_tokens=counts.tokens - counts.documents if counts.text_bytes else 0,
    )


def _without_token(counts: Counts, tokenizer: Tokenizer) -> Iterator[str]:
    """What of a text no token, or that for the unknown, stands for."""
    dropped, characters = counts.dropped_characters, counts.characters
    unknown, tokens = counts.unknown_tokens, counts.tokens
    if dropped:
        yield (
            f". {_share(dropped, characters, 'characters')} were left out: "
            f"data.tokenizer.{_leaves_out(tokenizer)}"
        )
    if unknown:
        yield (
            f". {_share(unknown, tokens, 'tokens')} are the unknown one, id {tokenizer.unknown}: "
            f"data.tokenizer.path {tokenizer.source} has no other for what stands there"
        )


def _share(part: int, whole: int, what: str) -> str:
    warning = "WARNING: " if part > MOST_WITHOUT_TOKEN * whole else ""
    return f"{warning}{part:,} of {whole:,} {what} ({100 * part / whole:.2g} %)"


def _leaves_out(tokenizer: Tokenizer) -> str:
    """What leaves out characters, after ``data.tokenizer.``."""
    if (pattern := tokenizer.kind.section.pattern) is not None:
        return f"pattern {pattern!r} finds them in no piece of text"
    return f"path {tokenizer.source} has no token for them, nor one for the unknown"


def make_token_bytes(
    config: RunConfig, tokenizer: Tokenizer | None, sources: Sequence[Source], desk: Desk
) -> Path | None:
    """The file of `token_bytes` [vocab_size]; None where nothing tells them, or the cache, made
    before there was one, cannot be written to."""
    if tokenizer is None:
        return None
    every = [one for source in sources for one in source.generations if one.text_bytes]
    text_bytes = sum(one.text_bytes for one in every)
    mean = text_bytes / sum(one.text_tokens for one in every) if every else None
    found = token_bytes(tokenizer, config.model.vocab_size, mean)
    if found is None:
        desk.say(
            f"validation has no bits per byte: the tokens of {tokenizer.source} do not say how "
            "many bytes they stand for, and no corpus was counted when it was tokenised"
        )
        return None
    folder = desk.cache / "token_bytes" / digest([CACHE_VERSION, found.tolist()])
    try:
        desk.make(folder, lambda scratch: np.save(scratch / BYTES_FILE, found))
    except (OSError, UserError) as error:
        desk.say(f"validation has no bits per byte: {error}")
        return None
    return folder / BYTES_FILE


def make_indices(config: RunConfig, sources: list[Source], desk: Desk) -> tuple[Path, dict]:
    """Index the samples of every source: the folder, and a summary with ``sources`` (a
    `samples.SourceSummary` of each, as a dict) and ``unigram_entropy_nats``.
    """
    content = [
        [source.digest, source.weight, *(one.digest for one in source.later)] for source in sources
    ]
    sizes = [config.run.seed, config.train.seq_length, config.model.vocab_size]
    key = digest([CACHE_VERSION, content, sizes, held_out_share(config)])
    folder = desk.cache / "indices" / key

    def build(scratch: Path) -> None:
        if any(not source.hashes_text for source in sources):
            desk.say("looking through the tokens of indexed corpora, once")
        hashes = [
            [_hashes(one, config, desk.cache) for one in source.generations] for source in sources
        ]
        desk.say("indexing samples")
        built = [
            together(
                [
                    build_indices(one, number, known, config, scratch, lends=one is source)
                    for one, known in zip(source.generations, hashes[number], strict=True)
                ]
            )
            for number, source in enumerate(sources)
        ]
        weights = [source.weight for source in sources]
        summary = {
            "sources": [asdict(one) for one, _ in built],
            "unigram_entropy_nats": unigram_entropy([counts for _, counts in built], weights),
        }
        write_json(scratch / "summary.json", summary)

    desk.make(folder, build)
    return folder, json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def _hashes(source: Source, config: RunConfig, cache: Path) -> np.ndarray | None:
    """The hash of each document of ``source``, whose token ids are found to be within the
    vocabulary: one pass over its tokens does both where they are not known yet. None where nothing
    is held out."""
    where, seen = f"{source.key} ({source.name})", cache / "token_ranges" / source.digest
    wanted = held_out_share(config) > 0
    hashed = wanted and not source.hashes_text
    check_vocabulary(source.prefixes, config.model.vocab_size, where, seen, hashed=hashed)
    if not wanted:
        return None
    return token_hashes(source.prefixes, seen) if hashed else text_hashes(source.prefixes)
