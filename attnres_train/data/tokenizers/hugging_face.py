"""Tokenizers in Hugging Face's `tokenizer.json`: brought by the user, or a byte-level BPE trained
here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from attnres_train.config.schema import TokenizerConfig
from attnres_train.data.tokenizers.kind import FileTokenizer
from attnres_train.errors import UserError

END_OF_DOCUMENT = "<|endoftext|>"
# Looked up in a `tokenizer.json` in this order, where `data.tokenizer.eod` says nothing.
USUAL_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|im_end|>")


class TokenizerJson(FileTokenizer):
    """A Hugging Face `tokenizer.json`."""

    def load(self, content: bytes, path: Path) -> HuggingFace:
        return HuggingFace(content, path, self.section)


class BytePairs(TokenizerJson):
    """A byte-level BPE, trained on the corpora."""

    needs_path = False
    trains_on_corpora = True
    reads_vocab_size = True

    @property
    def name(self) -> str:
        return f"a byte-level BPE of {self.section.vocab_size:,} tokens"

    def train(self, texts: Iterable[str], path: Path) -> None:
        train_bpe(texts, self.section.vocab_size, path)


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE of ``vocab_size`` tokens into ``path``; fewer when ``texts`` is small.

    Every byte is a token, so any text can be encoded.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.save(str(path))


class HuggingFace:
    """The backend of a `tokenizer.json`. Encodes on all cores."""

    def __init__(self, content: bytes, path: Path, config: TokenizerConfig) -> None:
        from tokenizers import Tokenizer

        try:
            self.backend = Tokenizer.from_str(content.decode())
        # The library raises bare Exceptions.
        except Exception as error:
            raise UserError(f"data.tokenizer.path: {path} is no tokenizer.json: {error}") from error
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()
        vocabulary = self.backend.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod = (
            config.eod if isinstance(config.eod, int) else _find(vocabulary, path, config.eod)
        )

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        # "fast": without each token's place in the text.
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)


def _find(vocabulary: dict[str, int], path: Path, name: str | None) -> int:
    """Id of the end-of-document token."""
    for candidate in [name] if name else USUAL_ENDS:
        if candidate in vocabulary:
            return vocabulary[candidate]
    looked = name or "any of " + " ".join(USUAL_ENDS)
    raise UserError(f"data.tokenizer.eod: {path} has no token {looked}: name the one to use")
