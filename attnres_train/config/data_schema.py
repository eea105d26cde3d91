"""The data section of a run's configuration: corpora and tokenizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from attnres_train.config.kind_fields import KindName, KindOptions, OptionsOf
from attnres_train.config.kinds import NoOptions
from attnres_train.config.paths import holding_paths
from attnres_train.config.section import Section

TokenId = Annotated[int, Field(strict=True, ge=0)]


class CorpusConfig(Section):
    kind: Annotated[str, KindName("data.corpus.kind")]
    """`python-stdlib`: this Python's own sources; `indexed`: a Megatron .bin/.idx prefix."""
    path: str | list[str] | None = None
    """File, folder, glob or list of them (a folder stands for its *.txt and *.md, *.jsonl, also
    compressed, *.parquet or *.arrow files, hidden ones left out); the prefix or list of prefixes
    (no suffix) for `indexed`."""
    weight: float = Field(1.0, gt=0)
    """Share of the blend, relative to the other corpora."""
    text_field: str = "text"
    """Field with the document in JSONL, Parquet and Arrow files."""
    options: Annotated[KindOptions, OptionsOf("data.corpus.kind")] = Field(
        default_factory=NoOptions, validate_default=True
    )
    """Options that a kind of your own declares."""

    _paths = holding_paths("path")


class TokenizerConfig(Section):
    kind: Annotated[str, KindName("data.tokenizer.kind")] = "bpe"
    """`bpe`: byte-level BPE trained on the corpora; `file`: a Hugging Face `tokenizer.json`;
    `tiktoken`: a tiktoken rank file; `sentencepiece`: a SentencePiece `.model`; `none`: token ids
    only, where every corpus is `indexed`."""
    path: str | None = None
    """The file, for `file`, `tiktoken` and `sentencepiece`; for `file` also a model's folder with a
    `tokenizer.json`, whose `eos_token` (`tokenizer_config.json`, else `special_tokens_map.json`)
    then ends documents."""
    vocab_size: int = Field(4096, ge=257)
    """Vocabulary to train, for `bpe`."""
    eod: str | int | None = None
    """Token that ends a document, by name or id: a special one, which no text is encoded to.
    Default: the file's own (`eos_token` of a folder, `</s>` of `sentencepiece`), that of `pattern`
    (`[EOS]` for `kimi`, `<|endoftext|>` for `gpt2` and `cl100k`), or the first usual name that is
    there, `<|endoftext|>` before others. After ranks alone, the first id after them."""
    pattern: str | None = None
    """How text is split before merging, for `tiktoken`, whose files do not say: `gpt2`, `cl100k`
    (GPT-4) or `kimi` (Kimi-Linear, Kimi-K2), or a regular expression. `cl100k` and `kimi` bring
    their special tokens. Default: GPT-2's expression, which is right for GPT-2's ranks and for
    ranks that were learnt with it; a file with as many ranks as `cl100k` or `kimi` must say."""
    special_tokens: dict[str, TokenId] | None = None
    """Special tokens of a rank file, name to id, for `tiktoken`, whose files hold none. Default:
    those of `pattern`, else `<|endoftext|>` alone."""
    options: Annotated[KindOptions, OptionsOf("data.tokenizer.kind")] = Field(
        default_factory=NoOptions, validate_default=True
    )
    """Options that a kind of your own declares."""

    _paths = holding_paths("path")


class StagedData(Section):
    """What a stage of a run may have of its own."""

    corpus: list[CorpusConfig] = Field([CorpusConfig(kind="python-stdlib")], min_length=1)
    """Corpora that are blended by weight."""
    split: tuple[float, float] = (0.98, 0.02)
    """Shares of the documents for training and validation. A hash of what a document holds says on
    which side it is, so that a corpus may grow; small corpora lend the end of their longest one.
    Nothing is held out where `train.eval_interval` is 0 (docs/data.md)."""
    reset_at_documents: bool = False
    """Keep the documents of a sample apart: attention, KDA state and convolutions start anew after
    each end of a document. Off by default, as in most published pretraining, whose losses then
    compare: a token may see the documents before its own."""
    mask_document_ends: bool = False
    """Leave the last token of each document out of the loss: what it is to predict, the first token
    of another document, is chance. The loss is then the mean over the others of a step. Off by
    default: losses of runs with and without `reset_at_documents` compare."""


class DataConfig(StagedData):
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    """The tokenizer."""
    new: Literal["append", "restart"] | None = None
    """What a run does that goes on when the files of its corpora are others now. Unset: it is
    refused. `append`: files that are new are mixed into the rest of the epoch, those that the run
    has read must be there as they were. `restart`: the data begin anew (see docs/checkpoints.md).
    """
    verify: Literal["sampled", "full"] = "sampled"
    """How corpora are told apart: by the names and sizes of their files and the hash of 16 blocks
    of 4 KiB of each (`sampled`; files up to 64 KiB whole), or by the hash of every byte (`full`)
    too. Where and when a file was written never counts."""
    cache_dir: str = "data_cache"
    """Folder for tokenizers, token shards and sample indices; shared between runs."""

    _paths = holding_paths("cache_dir")

    @property
    def tells_documents_apart(self) -> bool:
        """Whether batches depend on where documents end."""
        return self.reset_at_documents or self.mask_document_ends
