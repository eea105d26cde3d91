"""What data look like: of each corpus its documents, and of the first samples their text, as it is
learnt from. For people: nothing is computed with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from attnres_train.config.schema import RunConfig
from attnres_train.data.blend import Blend
from attnres_train.data.indexed import TokenSequences
from attnres_train.data.loader import BatchSource, open_data
from attnres_train.data.prepare import Prepared, open_tokenizer
from attnres_train.data.samples import Source
from attnres_train.data.shards import text_hashes
from attnres_train.data.token_range import look_through
from attnres_train.data.tokenizers.tokenizer import Tokenizer

_QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}


def look(config: RunConfig, prepared: Prepared, batches: int) -> dict[str, Any]:
    """``corpora``, a dict of each, and the ``samples`` of the first ``batches`` micro-batches of
    training, as JSON can hold them."""
    tokenizer = open_tokenizer(config, prepared)
    hashes = [_hashes(source) for source in prepared.sources]
    weights = sum(source.weight for source in prepared.sources)
    data = open_data(config, prepared)
    return {
        "tokenizer": tokenizer.source if tokenizer else None,
        "vocab_size": tokenizer.vocab_size if tokenizer else None,
        "bytes_per_token": prepared.bytes_per_token,
        "corpora": [
            _corpus(source, found, source.weight / weights)
            for source, found in zip(prepared.sources, hashes, strict=True)
        ],
        "repeated_documents": repeated(np.concatenate(hashes)),
        "samples": [
            _sample(data, prepared, tokenizer, number)
            for number in range(batches * config.train.micro_batch_size)
        ],
    }


def repeated(hashes: np.ndarray) -> int:
    """Documents that are there before, by their hashes."""
    return len(hashes) - len(np.unique(hashes))


def _corpus(source: Source, hashes: np.ndarray, share: float) -> dict[str, Any]:
    lengths = np.concatenate([_lengths(one) for one in source.generations])
    sizes = [one.text_bytes for one in source.generations]
    text_tokens = sum(one.text_tokens for one in source.generations)
    known = all(sizes)
    return {
        "key": source.key,
        "name": source.name,
        "share": share,
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "bytes": sum(sizes) if known else None,
        "tokens_per_byte": text_tokens / sum(sizes) if known else None,
        "lengths": {
            name: int(np.quantile(lengths, at, method="lower")) for name, at in _QUANTILES.items()
        }
        | {"mean": float(lengths.mean())},
        "repeated_documents": repeated(hashes),
    }


def _lengths(source: Source) -> np.ndarray:
    """Tokens of each document, its end among them."""
    data = TokenSequences(source.prefixes)
    return np.add.reduceat(data.sequence_lengths, data.document_starts, dtype=np.int64)


def _hashes(source: Source) -> np.ndarray:
    """Of each document, by its text where that was tokenised here, else by its tokens."""
    found = []
    for one in source.generations:
        if one.hashes_text:
            found.append(text_hashes(one.prefixes))
            continue
        for prefix in one.prefixes:
            *_, hashes = look_through(prefix, hashed=True)
            assert hashes is not None
            found.append(hashes)
    return np.concatenate(found)


def _sample(
    data: BatchSource, prepared: Prepared, tokenizer: Tokenizer | None, number: int
) -> dict[str, Any]:
    """Training sample ``number``, its T + 1 tokens in pieces."""
    row = data.train[number]
    corpus = data.train.corpus(number) if isinstance(data.train, Blend) else 0
    batch = data.collate([row], f"sample {number}")
    tokens, labels = row["tokens"].numpy(), row["labels"].numpy()
    ends = tokens == (-1 if prepared.eod is None else prepared.eod)
    ends |= row.get("sequence_ends", False)
    # Of the first token there is no prediction.
    in_loss = np.concatenate([[False], batch["loss_mask"][0].numpy() > 0])
    document = np.concatenate([[0], np.cumsum(ends)])
    return {
        "sample": number,
        "corpus": prepared.sources[corpus].key,
        "documents": int(document[-1]) + 1,
        "pieces": list(_pieces(np.append(tokens, labels[-1]), document, in_loss, tokenizer)),
    }


def _pieces(
    tokens: np.ndarray, document: np.ndarray, in_loss: np.ndarray, tokenizer: Tokenizer | None
) -> Iterator[dict[str, Any]]:
    """Runs of tokens of one document that all count in the loss, or do not."""
    changes = (np.diff(document) != 0) | (np.diff(in_loss) != 0)
    starts = [0, *(np.flatnonzero(changes) + 1).tolist()]
    for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
        ids = tokens[start:stop].tolist()
        yield {
            "document": int(document[start]),
            "in_loss": bool(in_loss[start]),
            "first": start,
            "tokens": len(ids),
            "text": tokenizer.decode(ids) if tokenizer else " ".join(map(str, ids)),
        }
