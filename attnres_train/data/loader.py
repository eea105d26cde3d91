"""Batches for the trainer, without a state: the samples of a step follow from how many were
consumed before it. Shapes: B samples of a micro-batch, T tokens (seq_length)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from attnres_train.config.schema import MOST_ROLL_BACKS, RunConfig
from attnres_train.data.indexed import keep_open
from attnres_train.data.labels import corpus_labels
from attnres_train.data.prepare import Prepared
from attnres_train.data.samples import Split, open_samples
from attnres_train.data.token_bytes import read_token_bytes
from attnres_train.data.unigrams import check_ids

Batch = dict[str, torch.Tensor]


def open_data(config: RunConfig, prepared: Prepared) -> BatchSource:
    """Open what `prepare` made for ``config``. Reads only, and needs no torch.distributed.

    Raises UserError when data was removed or damaged since.
    """
    train, open_shard = config.train, keep_open()
    steps: dict[Split, int] = {
        # Roll-backs pass over data: a run takes at most so many samples, whatever was configured
        # when they were made.
        "train": train.train_iters * (1 + MOST_ROLL_BACKS),
        "valid": train.eval_iters if train.eval_interval else 0,
    }
    samples = {
        split: open_samples(
            prepared.sources,
            split,
            iterations * train.global_batch_size,
            config,
            Path(prepared.indices),
            open_shard,
        )
        for split, iterations in steps.items()
        if iterations
    }
    table = prepared.token_bytes
    sizes = torch.from_numpy(read_token_bytes(table)) if table else None
    labels = zip(corpus_labels(config.data.corpus), prepared.sources, strict=True)
    validated = [label for label, source in labels if source.validates]
    return BatchSource(
        samples["train"], samples.get("valid"), config, prepared.eod, sizes, validated
    )


class BatchSource:
    """Deals samples to data-parallel ranks. All pipeline ranks of a replica get the same ones."""

    def __init__(
        self,
        train: Any,
        valid: Any,
        config: RunConfig,
        eod: int | None = None,
        token_bytes: torch.Tensor | None = None,
        validated: Sequence[str] = (),
    ) -> None:
        """``train`` and ``valid`` (None: no validation) are indexed by sample number. ``eod``, the
        token that ends a document, is needed where ``config.data`` tells documents apart.
        ``token_bytes`` float64 [vocab_size], see `data.token_bytes`. ``validated``: what the
        corpora of ``valid`` are called, needed where it blends several."""
        self.train = train
        self.valid = valid
        self.global_batch_size = config.train.global_batch_size
        self.micro_batch_size = config.train.micro_batch_size
        self.vocab_size = config.model.vocab_size
        self.data, self.eod = config.data, eod
        self.token_bytes = token_bytes
        self.validated = list(validated)

    def micro_batches(self, consumed_samples: int, dp_rank: int, dp_size: int) -> list[Batch]:
        """This rank's part of the samples [consumed, consumed + global_batch_size).

        A micro-batch holds ``tokens`` and ``labels`` int64 [B, T] and ``loss_mask`` float32 [B, T],
        with `data.reset_at_documents` also ``cu_seqlens`` int32 [documents + 1].
        """
        return self._deal(self.train, consumed_samples, dp_rank, dp_size)

    def validation_batches(self, index: int, dp_rank: int, dp_size: int) -> list[Batch]:
        """This rank's part of global batch ``index`` of the validation set, the same at every call.

        The set starts over where it has fewer samples than are asked for.
        """
        return self._deal(self.valid, index * self.global_batch_size, dp_rank, dp_size)

    def validation_groups(self, index: int, dp_rank: int, dp_size: int) -> list[torch.Tensor]:
        """Of which of the ``validated`` corpora the samples of `validation_batches` are: float32
        [B, G] for each, 1 for its own. Only of a blend of several."""
        kinds = torch.eye(len(self.validated))
        starts = self._starts(index * self.global_batch_size, dp_rank, dp_size)
        return [
            kinds[[self.valid.corpus(start + i) for i in range(self.micro_batch_size)]]
            for start in starts
        ]

    def text_bytes(self, batch: Batch) -> torch.Tensor | None:
        """Bytes of the text that the labels of ``batch`` stand for, float64 [B, T], 0 where the
        loss does not count; None where they are not known."""
        if self.token_bytes is None:
            return None
        return self.token_bytes[batch["labels"]] * batch["loss_mask"]

    def _deal(self, samples: Any, first: int, dp_rank: int, dp_size: int) -> list[Batch]:
        size, starts = self.micro_batch_size, self._starts(first, dp_rank, dp_size)
        return [self._batch(samples, start, start + size) for start in starts]

    def _starts(self, first: int, dp_rank: int, dp_size: int) -> range:
        """Micro-batch m of rank r takes the samples first + (m dp_size + r) B + [0, B)."""
        size, stride = self.micro_batch_size, self.micro_batch_size * dp_size
        return range(first + dp_rank * size, first + self.global_batch_size, stride)

    def _batch(self, samples: Any, start: int, stop: int) -> Batch:
        rows = [samples[number] for number in range(start, stop)]
        return self.collate(rows, f"the batch of samples {start} to {stop - 1}")

    def collate(self, rows: Sequence[Mapping[str, Any]], told: str) -> Batch:
        """The micro-batch of the samples ``rows``, which messages call ``told``."""
        batch = {
            name: torch.stack([row[name] for row in rows])
            for name in ("tokens", "labels", "loss_mask")
        }
        # Files may have changed since the run was prepared.
        for name in ("tokens", "labels"):
            check_ids(batch[name], self.vocab_size, told)
        if self.data.tells_documents_apart:
            ends = torch.stack([torch.from_numpy(row["sequence_ends"]) for row in rows])
            self._tell_documents_apart(batch, ends | (batch["tokens"] == self.eod))
        return batch

    def _tell_documents_apart(self, batch: Batch, ends: torch.Tensor) -> None:
        """``ends`` bool [B, T] marks the last token of each document."""
        if self.data.reset_at_documents:
            batch["cu_seqlens"] = cumulative_lengths(ends)
        if self.data.mask_document_ends:
            batch["loss_mask"] = batch["loss_mask"].masked_fill(ends, 0)


def cumulative_lengths(ends: torch.Tensor) -> torch.Tensor:
    """Cumulative lengths int32 [0, ..., B*T] of documents, whose last tokens ``ends`` bool [B, T]
    marks; the end of a sample ends a document too."""
    ends = ends.clone()
    ends[:, -1] = True
    return F.pad(ends.flatten().nonzero().flatten() + 1, (1, 0)).int()
