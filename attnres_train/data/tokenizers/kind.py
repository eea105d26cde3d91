"""What every kind of tokenizer answers: what it needs, whether it is trained on the corpora, and
how it is opened."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

from attnres_train.config.data_schema import TokenizerConfig
from attnres_train.config.files import beside, unread
from attnres_train.config.kinds import Kind, resolve
from attnres_train.config.schema import RunConfig
from attnres_train.data.corpora.reader import corpus_readers
from attnres_train.data.tokenizers.library import read_bytes
from attnres_train.errors import UserError


class Backend(Protocol):
    """Text to token ids and back.

    One that leaves out characters may count them in an attribute ``dropped``, and one with a token
    for what has no other may name its id in ``unknown``: how many there are is told. One whose
    tokens are bytes of the text, one after another, may give their numbers in ``token_bytes``, a
    list by id (0 for special tokens): bits per byte are exact then.
    """

    @property
    def vocab_size(self) -> int:
        """The largest id plus one."""

    @property
    def eod(self) -> int:
        """The id that ends a document, which no text is encoded to."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without `eod`."""

    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``, special tokens by name; broken UTF-8 as U+FFFD."""


class TokenizerKind(Kind):
    """A tokenizer: base of all kinds of tokenizer.

    A kind of your own has `open`, and says below what it needs. It works in the one process that
    prepares data, and wherever text is generated: the ranks of a run read token shards alone.
    """

    section: TokenizerConfig
    encodes_text: ClassVar[bool] = True
    """False: there is no tokenizer, and every corpus must hold tokens."""
    needs_path: ClassVar[bool] = False
    """Whether ``path`` names the file that it is opened with."""
    trains_on_corpora: ClassVar[bool] = False
    """Whether `train` makes the file that it is opened with."""
    reads_vocab_size: ClassVar[bool] = False
    """Whether ``vocab_size`` says how many tokens it is trained to have."""
    unread_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of the section that it does not read, so that a value there is told."""
    version: ClassVar[int | str | None] = None
    """Change it when the same text gives other tokens than before: caches are then made anew."""

    def open(self, path: Path | None) -> Backend:
        """Open it with its file: the one in ``path``, or the one that `train` wrote; or None.

        Raises UserError for a broken file. Whatever else it raises, `Tokenizer` makes one of.
        """
        raise UserError(f"{self.key}.kind {self.kind} has no method open(path)")

    def train(self, texts: Iterable[str], path: Path) -> None:
        """Train it on ``texts``, a sample of the corpora, and write ``path`` for `open` to read."""
        raise UserError(f"{self.key}.kind {self.kind} has no method train(texts, path)")

    def file(self, path: Path) -> Path:
        """The file that it is opened with, where ``path`` is what the configuration names."""
        return path

    def fingerprint(self) -> list[Any]:
        """What its tokens depend on besides the content of its file, as JSON can hold it."""
        return [self.section.model_dump(mode="json", exclude={"path"}), self.version]

    @property
    def kind(self) -> str:
        """As the configuration names it."""
        return self.section.kind

    @property
    def name(self) -> str:
        """For messages: what is trained."""
        return f"a tokenizer of kind {self.kind}"

    def check(self, config: RunConfig) -> Iterator[str]:
        """Keys that are missing, or not read; more tokens than the model has; text where there is
        no tokenizer."""
        if self.needs_path and self.section.path is None:
            yield f"{self.key}.path is missing: a tokenizer of kind {self.kind} needs one"
        elif self.section.path is not None and not self.needs_path:
            yield unread(f"{self.key}.path", self.kind)
        for name in self.unread_keys:
            if getattr(self.section, name) is not None:
                yield unread(f"{self.key}.{name}", self.kind)
        tokens, limit = self.section.vocab_size, config.model.vocab_size
        if self.reads_vocab_size and tokens > limit:
            yield too_many_tokens(f"{self.key}.vocab_size is", tokens, limit)
        corpora = corpus_readers(config.data)
        if not self.encodes_text and not all(corpus.holds_tokens for corpus in corpora):
            kinds = ", ".join(corpus.kind for corpus in corpora)
            yield (
                f"{self.key}.kind is {self.kind}, but data.corpus has the kinds {kinds}: only an "
                "indexed corpus needs no tokenizer"
            )

    def check_files(self) -> Iterator[str]:
        """A path that is not there."""
        if not self.needs_path or self.section.path is None:
            return
        path = Path(self.section.path)
        if self.file(path).is_file():
            return
        if path.is_dir():
            wanted = f"has no {self.file(path).name}" if self.file(path) != path else "is no file"
            yield f"{self.key}.path: the folder {path} {wanted}{beside(path / 'tokenizer')}"
        else:
            yield f"{self.key}.path: there is no file {path}{beside(path)}"


class NoTokenizer(TokenizerKind):
    """No tokenizer, where every corpus holds tokens."""

    encodes_text = False
    unread_keys = ("pattern", "special_tokens")


class FileTokenizer(TokenizerKind, ABC):
    """One that is opened with a file."""

    needs_path = True
    unread_keys: ClassVar[tuple[str, ...]] = ("pattern", "special_tokens")

    def open(self, path: Path | None) -> Backend:
        if path is None:
            raise UserError(f"{self.key}.path is missing: kind {self.kind} needs a file")
        return self.load(read_bytes(path), path)

    @abstractmethod
    def load(self, content: bytes, path: Path) -> Backend:
        """Open it with the ``content`` of ``path``, which is for messages. Raises UserError."""

    def fingerprint(self) -> list[Any]:
        # Of our own, tokens depend on the content of the file alone.
        return super().fingerprint() if ":" in self.kind else []


def tokenizer_kind(config: TokenizerConfig) -> TokenizerKind:
    """The kind that ``data.tokenizer`` names."""
    kind: TokenizerKind = resolve("data.tokenizer.kind", config.kind)(config, "data.tokenizer")
    return kind


def too_many_tokens(told: str, vocab_size: int, limit: int) -> str:
    """What to tell when ``vocab_size``, as ``told`` says, is above the model's ``limit``."""
    return (
        f"{told} {vocab_size}, but model.vocab_size is {limit}: raise model.vocab_size to at "
        f"least {vocab_size}"
    )
