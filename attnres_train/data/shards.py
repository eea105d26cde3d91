"""Text to token shards: Megatron's .bin/.idx files, part by part, in bounded memory.

A corpus is cut into parts of consecutive input files. A part is a folder that appears, complete, by
one rename: an interrupted run goes on at the first part that is not there. Whoever reads them sees
the shards of all parts as one sequence of documents (`indexed.TokenSequences`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from attnres_train.data.cache import published, write_json
from attnres_train.data.corpora.reader import CorpusReader, Passage
from attnres_train.data.document_hashes import SUFFIX
from attnres_train.data.indexed import check_indexed
from attnres_train.data.shard_writer import Counts, ShardWriter
from attnres_train.data.tokenizers.kind import Backend
from attnres_train.errors import UserError
from attnres_train.screen import Forgiving

# Input bytes of a part, at least; a larger file is a part of its own. So that few files are made,
# never more than MAX_PARTS parts.
PART_BYTES = 16 << 20
MAX_PARTS = 256
# Characters that are tokenised at once: what bounds memory.
BATCH_CHARS = 1 << 20


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
    total, is_counted = Counts(), True
    # disable=None: no bar where the screen is no terminal.
    with tqdm(
        desc=f"tokenising {corpus.kind}",
        total=total_bytes,
        unit="B",
        unit_scale=True,
        disable=None if progress else True,
        leave=False,
        file=Forgiving(sys.stderr),
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
            is_counted &= "text_bytes" in counts
    total.text_bytes *= is_counted
    if not total.documents:
        raise UserError(
            f"{corpus.key} ({corpus.name}) is empty: no text in {len(corpus.files)} files"
        )
    return total


def shard_prefixes(folder: Path) -> list[str]:
    """Prefixes of all shards below ``folder``, in the order of their documents."""
    return [str(file.with_suffix("")) for file in sorted(folder.glob("part_*[0-9]/*.idx"))]


def text_hashes(prefixes: Iterable[str]) -> np.ndarray:
    """The hash of each document's text in ``prefixes``' shards, uint64."""
    return np.concatenate([np.fromfile(prefix + SUFFIX, "<u8") for prefix in prefixes])


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
    prefixes = [str(file.with_suffix("")) for file in part.glob("*.idx")]
    try:
        counts = json.loads((part / "part.json").read_text(encoding="utf-8"))
        sizes = [check_indexed(prefix) for prefix in prefixes]
        hashed = sum(Path(prefix + SUFFIX).stat().st_size for prefix in prefixes)
    except (FileNotFoundError, UserError):
        return False
    whole = 8 * counts["documents"] == hashed
    return whole and counts["tokens"] == sum(size.num_tokens for size in sizes)


def write_part(
    corpus: CorpusReader, files: list[Path], tokenizer: Backend, part: Path, bar: tqdm
) -> None:
    """Tokenise ``files`` into the folder ``part``, which appears only when it is complete."""
    passages = (passage for file in files for passage in corpus.read(file))
    dropped = getattr(tokenizer, "dropped", 0)
    with published(part) as scratch:
        unknown = getattr(tokenizer, "unknown", None)
        writer = ShardWriter(scratch, tokenizer.vocab_size, tokenizer.eod, unknown)
        for batch in batches(passages):
            encoded = tokenizer.encode_batch([passage.text for passage in batch])
            for passage, ids in zip(batch, encoded, strict=True):
                writer.add(ids, passage.ends_document, passage.text)
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
