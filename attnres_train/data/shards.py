"""Text to token shards: Megatron's .bin/.idx files, part by part, in bounded memory.

A corpus is cut into parts of consecutive input files. A part is a folder that appears, complete, by
one rename: an interrupted run goes on at the first part that is not there. Whoever reads them sees
the shards of all parts as one sequence of documents (`indexed.TokenSequences`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from attnres_train.data.cache import published, write_json
from attnres_train.data.corpora.reader import CorpusReader, Passage
from attnres_train.data.indexed import check_indexed
from attnres_train.data.megatron import megatron_datasets
from attnres_train.data.tokenizers.kind import Backend
from attnres_train.errors import UserError

# Input bytes of a part, at least; a larger file is a part of its own. So that few files are made,
# never more than MAX_PARTS parts.
PART_BYTES = 16 << 20
MAX_PARTS = 256
# Characters that are tokenised at once: what bounds memory.
BATCH_CHARS = 1 << 20
# Tokens of a shard, at least: what bounds the index that its writer holds in memory.
SHARD_TOKENS = 1 << 28


@dataclass
class Counts:
    """What a part holds. ``empty_documents`` were skipped, ``dropped_characters`` had no token."""

    documents: int = 0
    empty_documents: int = 0
    tokens: int = 0
    dropped_characters: int = 0


def tokenise(
    corpus: CorpusReader,
    tokenizer: Backend,
    folder: Path,
    *,
    progress: bool,
    before_writing: Callable[[], None] = lambda: None,
) -> Counts:
    """Write the token shards of ``corpus`` below ``folder``; parts that are there are kept, and
    where all are, nothing is written and ``before_writing`` not called.

    Raises UserError when a file cannot be read or the corpus has no text.
    """
    sized = [(file, corpus.contents[file].size) for file in corpus.files]
    parts = group_files(sized)
    total_bytes = sum(size for _, size in sized)
    total = Counts()
    # disable=None: no bar where the screen is no terminal.
    with tqdm(
        desc=f"tokenising {corpus.kind}",
        total=total_bytes,
        unit="B",
        unit_scale=True,
        disable=None if progress else True,
        leave=False,
    ) as bar:
        for number, files in enumerate(parts):
            part = folder / f"part_{number:05d}"
            whole = is_whole(part)
            if not whole:
                before_writing()
                whole = is_whole(part)  # made by the run that was waited for
            if whole:
                bar.update(sum(corpus.contents[file].size for file in files))
            else:
                write_part(corpus, files, tokenizer, part, bar)
            counts = json.loads((part / "part.json").read_text(encoding="utf-8"))
            for name in asdict(total):
                setattr(total, name, getattr(total, name) + counts.get(name, 0))
    if not total.documents:
        raise UserError(
            f"{corpus.key} ({corpus.name}) is empty: no text in {len(corpus.files)} files"
        )
    return total


def shard_prefixes(folder: Path) -> list[str]:
    """Prefixes of all shards below ``folder``, in the order of their documents."""
    return [str(file.with_suffix("")) for file in sorted(folder.glob("part_*[0-9]/*.idx"))]


def group_files(sized: list[tuple[Path, int]]) -> list[list[Path]]:
    """Cut (file, bytes) pairs into runs of at least PART_BYTES (the last may be smaller)."""
    least = max(PART_BYTES, sum(size for _, size in sized) // MAX_PARTS)
    groups: list[list[Path]] = []
    filled = least
    for file, size in sized:
        if filled >= least:
            groups.append([])
            filled = 0
        groups[-1].append(file)
        filled += size
    return groups


def is_whole(part: Path) -> bool:
    """Whether ``part`` was finished, and none of its files was cut short since."""
    try:
        counts = json.loads((part / "part.json").read_text(encoding="utf-8"))
        sizes = [check_indexed(str(file.with_suffix(""))) for file in part.glob("*.idx")]
    except (FileNotFoundError, UserError):
        return False
    return counts["tokens"] == sum(size.num_tokens for size in sizes)


def write_part(
    corpus: CorpusReader, files: list[Path], tokenizer: Backend, part: Path, bar: tqdm
) -> None:
    """Tokenise ``files`` into the folder ``part``, which appears only when it is complete."""
    passages = (passage for file in files for passage in corpus.read(file))
    dropped = getattr(tokenizer, "dropped", 0)
    with published(part) as scratch:
        writer = ShardWriter(scratch, tokenizer.vocab_size, tokenizer.eod)
        for batch in batches(passages):
            encoded = tokenizer.encode_batch([passage.text for passage in batch])
            for passage, ids in zip(batch, encoded, strict=True):
                writer.add(ids, passage.ends_document)
            bar.update(sum(passage.num_bytes for passage in batch))
        writer.close()
        corpus.check_unchanged(files)
        writer.counts.dropped_characters = getattr(tokenizer, "dropped", 0) - dropped
        write_json(scratch / "part.json", asdict(writer.counts))


def batches(passages: Iterable[Passage]) -> Iterator[list[Passage]]:
    """Lists of passages of about BATCH_CHARS characters, taking no more than it gives."""
    batch: list[Passage] = []
    chars = 0
    for passage in passages:
        batch.append(passage)
        # An empty one counts too, so that a batch of them ends.
        chars += len(passage.text) + 1
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


class ShardWriter:
    """Writes token sequences to ``00000.bin/.idx``, ``00001.bin/.idx``, ... in ``folder``: a new
    shard at the first document after every SHARD_TOKENS tokens. Ids are uint16 where the
    vocabulary fits, as in Megatron's own files, else int32.
    """

    def __init__(self, folder: Path, vocab_size: int, eod: int) -> None:
        self.folder = folder
        self.vocab_size = vocab_size
        self.eod = eod
        self.counts = Counts()
        self._num_shards = 0
        self._shard_tokens = 0
        self._in_document = False
        self._builder: Any = None

    def add(self, ids: list[int], ends_document: bool) -> None:
        """Append a document, or the next part of one. Documents without tokens are left out."""
        if ends_document and (ids or self._in_document):
            ids = [*ids, self.eod]
            self.counts.documents += 1
        elif ends_document:
            self.counts.empty_documents += 1
        if ids:
            self._write(ids)
        self._in_document = bool(ids or self._in_document) and not ends_document
        if ids and ends_document:
            self._builder.end_document()
            if self._shard_tokens >= SHARD_TOKENS:
                self.close()

    def close(self) -> None:
        """Write the index of the open shard."""
        if self._builder is not None:
            self._builder.finalize(f"{self._prefix()}.idx")
            self._builder, self._shard_tokens = None, 0
            self._num_shards += 1

    def _write(self, ids: list[int]) -> None:
        import torch

        if self._builder is None:
            indexed_dataset = megatron_datasets("indexed_dataset")
            dtype = indexed_dataset.DType.optimal_dtype(self.vocab_size)
            self._builder = indexed_dataset.IndexedDatasetBuilder(f"{self._prefix()}.bin", dtype)
        tensor = torch.tensor(ids, dtype=torch.int64)
        low, high = map(int, tensor.aminmax())
        if low < 0 or high >= self.vocab_size:
            # Stored in two bytes, it would become another token.
            raise UserError(
                f"data.tokenizer gave the token id {low if low < 0 else high}, but its vocabulary "
                f"has the ids 0 to {self.vocab_size - 1}"
            )
        self._builder.add_item(tensor.int())
        self._shard_tokens += len(ids)
        self.counts.tokens += len(ids)

    def _prefix(self) -> Path:
        return self.folder / f"{self._num_shards:05d}"
