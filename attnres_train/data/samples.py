"""Training samples: windows of seq_length + 1 tokens over the shuffled documents of every corpus,
blended by weight.

The windows are megatron-core's GPTDataset, the blend its BlendedDataset. GPTDataset is always built
for one epoch: the order it makes for several depends on how many samples are asked for, and a run
must see the same samples whatever its `train_iters`, batch size or number of ranks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from attnres_train.config.schema import RunConfig
from attnres_train.data.blend import Blend
from attnres_train.data.held_out import Cut, held_out_share, part
from attnres_train.data.indexed import OpenShard, TokenSequences
from attnres_train.data.megatron import megatron_datasets
from attnres_train.data.unigrams import count_unigrams
from attnres_train.errors import UserError

Split = Literal["train", "valid"]

# The order of what is held out does not change with `run.seed`: losses of runs with other seeds
# compare.
HELD_OUT_SEED = 0
# Raised when the same corpora give other samples, or others are held out: a run that resumes
# compares it. 1: documents were cut at 64 Ki characters, and dealt by their number.
SAMPLES_VERSION = 2


@dataclass(frozen=True)
class Source:
    """A tokenised corpus."""

    key: str
    """The user's: ``data.corpus.0``."""
    name: str
    """For messages: kind and path."""
    digest: str
    """Stands for all that its tokens depend on, and the format of the cache: names what is cached
    of it."""
    weight: float
    prefixes: list[str]
    content: str = ""
    """Stands for what its files hold, how they are read and what tokenised them, whatever the
    format of the cache and `data.verify`: of equal ``content``, a corpus has equal tokens."""
    hashes_text: bool = False
    """Whether the hashes of its documents' texts lie beside its shards; else those of their tokens
    are what is held out by."""
    validates: bool = False
    """Whether some of it is held out, and makes a sample."""
    cut: Cut | None = None


@dataclass(frozen=True)
class SourceSummary:
    """What a corpus gives to a run."""

    documents: int
    held_out: int
    """Documents that are held out whole."""
    lent_tokens: int
    """Last tokens of its longest document that are held out."""
    cut: Cut | None
    train_tokens: int
    valid_tokens: int
    train_samples: int


class EpochSamples:
    """The samples of a corpus, epoch after epoch without end: item i is a pure function of
    (seed, i).

    Epoch 0 has the dataset's own random order. Later epochs walk that order in random strides
    (x -> a x + b modulo its length, a and b drawn from the seed and the epoch), which is another
    order of the same samples and, unlike a stored permutation, takes no memory.
    """

    def __init__(self, dataset: Any, seed: int, with_ends: bool = False) -> None:
        """``with_ends`` adds ``sequence_ends`` to every sample (see `sequence_ends`)."""
        self.dataset = dataset
        self.seed = seed
        self.with_ends = with_ends
        self.samples_per_epoch = len(dataset)
        # What BlendedDataset asks of its members.
        self.index_split = dataset.index_split
        self.unique_identifiers = dataset.unique_identifiers

    def __len__(self) -> int:
        return 1 << 62

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, place = divmod(int(index), self.samples_per_epoch)
        place = self.place_in_first_epoch(epoch, place)
        sample = self.dataset[place]
        if self.with_ends:
            sample["sequence_ends"] = sequence_ends(self.dataset, place)
        return sample

    def place_in_first_epoch(self, epoch: int, place: int) -> int:
        """Where epoch 0 has the sample that ``epoch`` has at ``place``."""
        if epoch == 0:
            return place
        size = self.samples_per_epoch
        draw = random.Random(f"seed {self.seed} epoch {epoch}")
        offset, stride = draw.randrange(size), draw.randrange(size)
        while math.gcd(stride, size) != 1:
            stride = draw.randrange(size)
        return (stride * place + offset) % size


def sequence_ends(dataset: Any, place: int) -> np.ndarray:
    """Bool [seq_length]: the tokens of sample ``place`` of a GPTDataset that are the last ones of a
    stored sequence, which is a document (but see `shard_writer.SEQUENCE_TOKENS` and `held_out.Cut`;
    others' files may have several sequences in one). What follows in the sample comes from
    elsewhere in the corpus."""
    sample = dataset.shuffle_index[place]
    (first, offset), (last, _) = (dataset.sample_index[i].tolist() for i in (sample, sample + 1))
    lengths = [dataset.dataset.length(i) for i in dataset.document_index[first:last]]
    ends = np.zeros(dataset.config.sequence_length, dtype=bool)
    starts_after = np.cumsum(lengths, dtype=np.int64) - offset
    ends[starts_after[starts_after > 0] - 1] = True
    return ends


def build_indices(
    source: Source, number: int, hashes: np.ndarray | None, config: RunConfig, folder: Path
) -> tuple[SourceSummary, np.ndarray]:
    """Build GPTDataset's indices of corpus ``number``, whose documents have ``hashes`` (needed
    where some are held out), in ``folder``, for `open_samples` to read. Returns also counts
    [vocab_size] of its training tokens.

    Raises UserError when it is smaller than one sample, or holds a token id outside the model's
    vocabulary.
    """
    data = TokenSequences(source.prefixes)
    needed, where = config.train.seq_length + 1, f"{source.key} ({source.name})"
    starts, share = data.document_starts, held_out_share(config)
    if hashes is None:
        hashes = np.zeros(len(starts), np.uint64)
    sides = part(data.sequence_lengths, starts, hashes, share, needed)
    data = TokenSequences(source.prefixes, cut=sides.cut)
    parts: dict[Split, np.ndarray] = {"train": sides.train, "valid": sides.valid}
    tokens = {
        split: int(data.sequence_lengths[part].sum(dtype=np.int64)) for split, part in parts.items()
    }
    if tokens["train"] < needed:
        raise UserError(
            f"{where} has {tokens['train']} training tokens, too few for one "
            f"sample of train.seq_length + 1 = {needed}: bring more text, or lower train.seq_length"
        )
    built = {
        split: _gpt_dataset(data, source, number, split, config, folder, parts[split])
        for split in parts
        if tokens[split]
    }
    summary = SourceSummary(
        documents=sides.documents,
        held_out=sides.held_out,
        lent_tokens=sides.lent_tokens,
        cut=sides.cut,
        train_tokens=tokens["train"],
        valid_tokens=tokens["valid"],
        train_samples=len(built["train"]),
    )
    return summary, count_unigrams(built["train"], config.model.vocab_size, where)


def open_samples(
    sources: Sequence[Source],
    split: Split,
    num_samples: int,
    config: RunConfig,
    folder: Path,
    open_shard: OpenShard | None = None,
) -> Any:
    """The blend of ``sources``, for validation of those that are validated on: item
    i < ``num_samples`` is a dict with ``tokens`` and ``labels`` int64 [seq_length], ``loss_mask``
    float32 [seq_length], ``sequence_ends`` bool [seq_length] if documents are told apart and, where
    several are blended, the number among them ``dataset_id``. A larger ``num_samples`` extends the
    same sequence. ``open_shard``: see `keep_open`.

    Raises UserError when the indices or the token files are missing or damaged.
    """
    samples = []
    weights = []
    for number, source in enumerate(sources):
        if split == "valid" and not source.validates:
            continue
        weights.append(source.weight)
        data = TokenSequences(source.prefixes, open_shard, source.cut)
        try:
            dataset = _gpt_dataset(data, source, number, split, config, folder, None)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(
                f"the sample indices in {folder} are missing or damaged ({error}): remove that "
                "folder and run `attnres-train data CONFIG` again"
            ) from error
        seed, with_ends = _seed(number, split, config), config.data.tells_documents_apart
        samples.append(EpochSamples(dataset, seed, with_ends))
    if len(samples) == 1:
        return samples[0]
    return Blend(samples, weights, num_samples)


def _gpt_dataset(
    data: TokenSequences,
    source: Source,
    number: int,
    split: Split,
    config: RunConfig,
    folder: Path,
    sequences: np.ndarray | None,
) -> Any:
    """One epoch. Builds the indices of ``sequences``, or reads those in ``folder`` if None."""
    gpt_dataset = megatron_datasets("gpt_dataset")
    settings = gpt_dataset.GPTDatasetConfig(
        random_seed=_seed(number, split, config),
        sequence_length=config.train.seq_length,
        blend_per_split=[([source.digest], None), ([source.digest], None), None],
        path_to_cache=str(folder),
        fast_cache_load=sequences is None,
        # It never tokenises: it asks for a name for its cache, and for an id for unused masks.
        tokenizer=SimpleNamespace(unique_identifiers=source.digest, vocab_size=None, eod=None),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    split_type = megatron_datasets("utils").Split[split]
    return gpt_dataset.GPTDataset(data, source.digest, sequences, None, split_type, settings)


def _seed(number: int, split: Split, config: RunConfig) -> int:
    """Seed of a corpus's order, 32 bits."""
    seed = [config.run.seed, number] if split == "train" else [HELD_OUT_SEED]
    return int(np.random.SeedSequence(seed).generate_state(1)[0])
