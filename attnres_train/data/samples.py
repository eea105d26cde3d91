"""Training samples: windows of seq_length + 1 tokens over the shuffled documents of every corpus,
blended by weight.

The windows are megatron-core's GPTDataset, the blend its BlendedDataset. GPTDataset is always built
for one epoch: the order it makes for several depends on how many samples are asked for, and a run
must see the same samples whatever its `train_iters`, batch size or number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from attnres_train.config.schema import RunConfig
from attnres_train.data.blend import Blend
from attnres_train.data.epochs import EpochSamples
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
    start: int = 0
    """From which sample of the corpus on these files belong to it (`data.generations`)."""
    files: str = ""
    """Digest of the list of its files (`CorpusReader.rows`)."""
    num_files: int = 0
    text_bytes: int = 0
    """Of the text that was tokenised, in UTF-8; 0 where that is not known."""
    text_tokens: int = 0
    """Of that text, without those that end documents."""
    later: tuple[Source, ...] = ()
    """Files that came to the corpus while the run was on its way."""

    @property
    def generations(self) -> tuple[Source, ...]:
        """All its files, by when they came."""
        return (self, *self.later)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Source:
        """The source of which `dataclasses.asdict` gave ``plain``, be it by way of JSON."""
        cut, later = plain["cut"], map(cls.of, plain["later"])
        return cls(**{**plain, "cut": Cut(**cut) if cut else None, "later": tuple(later)})


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


def build_indices(
    source: Source,
    number: int,
    hashes: np.ndarray | None,
    config: RunConfig,
    folder: Path,
    *,
    lends: bool = True,
) -> tuple[SourceSummary, np.ndarray]:
    """Build GPTDataset's indices of corpus ``number``, whose documents have ``hashes`` (needed
    where some are held out), in ``folder``, for `open_samples` to read. Returns also counts
    [vocab_size] of its training tokens. Without ``lends`` they are files that came later, which
    lend nothing to validation (`part`).

    Raises UserError when it is smaller than one sample, or holds a token id outside the model's
    vocabulary.
    """
    data = TokenSequences(source.prefixes)
    needed, where = config.train.seq_length + 1, f"{source.key} ({source.name})"
    starts, share = data.document_starts, held_out_share(config)
    if hashes is None:
        hashes = np.zeros(len(starts), np.uint64)
    sides = part(data.sequence_lengths, starts, hashes, share, needed if lends else None)
    data = TokenSequences(source.prefixes, cut=sides.cut)
    parts: dict[Split, np.ndarray] = {"train": sides.train, "valid": sides.valid}
    if not lends:
        del parts["valid"]
    tokens = {
        split: int(data.sequence_lengths[part].sum(dtype=np.int64)) for split, part in parts.items()
    }
    if tokens["train"] < needed:
        remedy = "bring more text, or lower train.seq_length"
        if not lends:
            held = int(data.sequence_lengths[sides.valid].sum(dtype=np.int64))
            remedy = f"{held} are held out by the hash of their document; add more files with them"
        raise UserError(
            f"{where} has {tokens['train']} training tokens, too few for one "
            f"sample of train.seq_length + 1 = {needed}: {remedy}"
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
        valid_tokens=tokens.get("valid", 0),
        train_samples=len(built["train"]),
    )
    return summary, count_unigrams(built["train"], config.model.vocab_size, where)


def together(
    generations: Sequence[tuple[SourceSummary, np.ndarray]],
) -> tuple[SourceSummary, np.ndarray]:
    """What the ``generations`` of a corpus give, of `build_indices`: the first alone to validation,
    all to training."""
    summaries = [summary for summary, _ in generations]
    whole = replace(
        summaries[0],
        train_tokens=sum(one.train_tokens for one in summaries),
        train_samples=sum(one.train_samples for one in summaries),
    )
    return whole, np.sum([counts for _, counts in generations], axis=0)


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
        # What is held out is the first files': losses compare when others come.
        generations = source.generations if split == "train" else (source,)
        datasets = [_opened(one, number, split, config, folder, open_shard) for one in generations]
        later = [(one.start, d) for one, d in zip(generations[1:], datasets[1:], strict=True)]
        seed, with_ends = _seed(number, split, config), config.data.tells_documents_apart
        samples.append(EpochSamples(datasets[0], seed, with_ends, later))
    if len(samples) == 1:
        return samples[0]
    return Blend(samples, weights, num_samples)


def _opened(
    source: Source,
    number: int,
    split: Split,
    config: RunConfig,
    folder: Path,
    open_shard: OpenShard | None,
) -> Any:
    data = TokenSequences(source.prefixes, open_shard, source.cut)
    try:
        return _gpt_dataset(data, source, number, split, config, folder, None)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(
            f"the sample indices in {folder} are missing or damaged ({error}): remove that "
            "folder and run `attnres-train data CONFIG` again"
        ) from error


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
