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
from attnres_train.data.indexed import OpenShard, TokenSequences
from attnres_train.data.megatron import megatron_datasets
from attnres_train.data.unigrams import count_unigrams
from attnres_train.errors import UserError

Split = Literal["train", "valid"]

# What is held out does not change with `run.seed`: losses of runs with other seeds compare.
HELD_OUT_SEED = 0


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


@dataclass(frozen=True)
class SourceSummary:
    """What a corpus gives to a run. ``unigrams``: counts [vocab_size] of its training tokens."""

    train_tokens: int
    valid_tokens: int
    train_samples: int
    unigrams: np.ndarray


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
    stored sequence. What follows such a token in the sample comes from elsewhere in the corpus,
    even where no document ends: of a long text, each passage is a sequence (see `corpora.text`)."""
    sample = dataset.shuffle_index[place]
    (first, offset), (last, _) = (dataset.sample_index[i].tolist() for i in (sample, sample + 1))
    lengths = [dataset.dataset.length(i) for i in dataset.document_index[first:last]]
    ends = np.zeros(dataset.config.sequence_length, dtype=bool)
    starts_after = np.cumsum(lengths, dtype=np.int64) - offset
    ends[starts_after[starts_after > 0] - 1] = True
    return ends


def split_sequences(num_sequences: int, shares: tuple[float, float]) -> dict[Split, np.ndarray]:
    """Deal sequences at random to training and validation. Each int32, ascending.

    A share above 0 gets a sequence at least, where there are two.
    """
    share = shares[1] / sum(shares)
    num_valid = round(num_sequences * share)
    if share > 0:
        num_valid = min(max(num_valid, 1), num_sequences - 1)
    order = np.random.default_rng(HELD_OUT_SEED).permutation(num_sequences).astype(np.int32)
    return {"train": np.sort(order[num_valid:]), "valid": np.sort(order[:num_valid])}


def build_indices(source: Source, number: int, config: RunConfig, folder: Path) -> SourceSummary:
    """Build GPTDataset's indices of corpus ``number`` in ``folder``, for `open_samples` to read.

    Raises UserError when its training share is smaller than one sample, or holds a token id outside
    the model's vocabulary.
    """
    data = TokenSequences(source.prefixes)
    needed = config.train.seq_length + 1
    parts = split_sequences(len(data.sequence_lengths), config.data.split)
    tokens = {
        split: int(data.sequence_lengths[part].sum(dtype=np.int64)) for split, part in parts.items()
    }
    if tokens["train"] < needed:
        raise UserError(
            f"{source.key} ({source.name}) has {tokens['train']} training tokens, too few for one "
            f"sample of train.seq_length + 1 = {needed}: bring more text, or lower train.seq_length"
        )
    built = {
        split: _gpt_dataset(data, source, number, split, config, folder, parts[split])
        for split in parts
        if tokens[split] >= needed
    }
    unigrams = count_unigrams(
        built["train"], config.model.vocab_size, f"{source.key} ({source.name})"
    )
    return SourceSummary(tokens["train"], tokens["valid"], len(built["train"]), unigrams)


def open_samples(
    sources: Sequence[Source],
    split: Split,
    num_samples: int,
    config: RunConfig,
    folder: Path,
    open_shard: OpenShard | None = None,
) -> Any:
    """The blend of ``sources``: item i < ``num_samples`` is a dict with ``tokens`` and ``labels``
    int64 [seq_length], ``loss_mask`` float32 [seq_length], ``sequence_ends`` bool [seq_length] if
    documents are told apart and, where there are several sources, the source's number
    ``dataset_id``. A larger ``num_samples`` extends the same sequence. ``open_shard``: see
    `keep_open`.

    Raises UserError when the indices or the token files are missing or damaged.
    """
    samples = []
    for number, source in enumerate(sources):
        data = TokenSequences(source.prefixes, open_shard)
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
    return Blend(samples, [source.weight for source in sources], num_samples)


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
    seed = config.run.seed if split == "train" else HELD_OUT_SEED
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
