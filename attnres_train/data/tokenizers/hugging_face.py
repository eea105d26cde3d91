"""Tokenizers in Hugging Face's `tokenizer.json`: brought by the user, or a byte-level BPE trained
here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attnres_train.config.data_schema import TokenizerConfig
from attnres_train.data.tokenizers.coverage import (
    Coverage,
    check_unknown_token,
    is_byte_level,
    unknown_token,
)
from attnres_train.data.tokenizers.kind import FileTokenizer
from attnres_train.data.tokenizers.library import missing_ids, read_bytes, told
from attnres_train.data.tokenizers.patterns import END_OF_DOCUMENT
from attnres_train.errors import UserError
from attnres_train.words import some_of

FILE = "tokenizer.json"
# Looked up in a `tokenizer.json` in this order, where `data.tokenizer.eod` says nothing.
USUAL_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|im_end|>")


class TokenizerJson(FileTokenizer):
    """A Hugging Face `tokenizer.json`, or the folder of a model that holds one."""

    def load(self, content: bytes, path: Path) -> HuggingFace:
        # A folder stands for all that it says; a file for itself.
        folder = path.parent if path != Path(self.section.path or "") else None
        return HuggingFace(content, path, self.section, folder)

    def file(self, path: Path) -> Path:
        return path / FILE if path.is_dir() else path


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

    def __init__(
        self, content: bytes, path: Path, config: TokenizerConfig, folder: Path | None
    ) -> None:
        """``folder`` may hold the files that Hugging Face writes beside ``path``."""
        from tokenizers import Tokenizer

        with told(f"data.tokenizer.path: {path} is no tokenizer.json"):
            written = json.loads(content.decode())
            if not isinstance(written, dict) or not isinstance(written.get("model"), dict):
                raise ValueError("it describes no model")
            check_unknown_token(written, path)
            self.backend = Tokenizer.from_str(content.decode())
            added = {one["content"]: one["id"] for one in written.get("added_tokens") or []}
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True
        vocabulary = self.backend.get_vocab()
        _check_ids(vocabulary, added, path)
        self.vocab_size = len(vocabulary)
        self.eod = _end_of_document(vocabulary, added, path, config.eod, folder)
        self.unknown = unknown_token(written["model"], vocabulary)
        self.token_bytes = _token_bytes(written, vocabulary, added)
        self._coverage: Coverage | None = None
        with told(f"data.tokenizer.path: {path} does not encode text"):
            self._keep_end_out_of_text(added, path)
            self._coverage = Coverage.of(written, self.backend)

    def _keep_end_out_of_text(self, added: dict[str, int], path: Path) -> None:
        """Raise UserError where a text may hold the token that ends documents."""
        from tokenizers import AddedToken, Regex, pre_tokenizers

        name = str(self.backend.id_to_token(self.eod))
        if self._is_found_in_text(name) and name in added and len(name) > 1:
            # One that is not special is looked for in text.
            self.backend.add_special_tokens([AddedToken(name, special=True, normalized=False)])
            # And a model may have it among its words (T5's Unigram): cut after its first character.
            first = Regex(f"{re.escape(name[0])}(?={re.escape(name[1:])})")
            cut = pre_tokenizers.Split(first, "merged_with_previous")
            rest = self.backend.pre_tokenizer
            self.backend.pre_tokenizer = pre_tokenizers.Sequence([cut, rest] if rest else [cut])
        if self._is_found_in_text(name):
            raise UserError(
                f"data.tokenizer.eod: {path} encodes text that holds {name!r} to its id, "
                f"{self.eod}, so a document could end itself: choose a special token, "
                f"{_names(added)}"
            )

    def _is_found_in_text(self, name: str) -> bool:
        shown = {name, self.decode([self.eod])}
        texts = [form for one in shown for form in (one, f"a {one} b", f"a{one}b")]
        return any(self.eod in ids for ids in self.encode_batch(texts))

    @property
    def dropped(self) -> int:
        """Characters left out so far, for want of a token."""
        return self._coverage.dropped if self._coverage else 0

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        if self._coverage:
            self._coverage.count(texts)
        # "fast": without each token's place in the text.
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)


def _token_bytes(
    written: dict[str, Any], vocabulary: dict[str, int], added: dict[str, int]
) -> list[int] | None:
    """Bytes of each token of a `tokenizer.json` as ``written``, by id; None where tokens are not
    bytes of the text as it was: after a normalisation, or without a token for every byte."""
    if written["model"].get("type") != "BPE" or written.get("normalizer"):
        return None
    if not is_byte_level(written):
        return None
    special = {one["content"] for one in written.get("added_tokens") or [] if one.get("special")}
    sizes = [0] * len(vocabulary)
    for name, number in vocabulary.items():
        # A character stands for a byte there, but in an added token that is found in text.
        found_in_text = name in added and name not in special
        sizes[number] = len(name.encode()) if found_in_text else len(name)
        if name in special:
            sizes[number] = 0
    return sizes


def _check_ids(vocabulary: dict[str, int], added: dict[str, int], path: Path) -> None:
    """Raise UserError where ids are not those that the file says, or not one for each token."""
    start = f"data.tokenizer.path: {path}"
    names: dict[int, str] = {}
    for name, number in vocabulary.items():
        if number in names:
            raise UserError(f"{start} gives the id {number} twice: to {names[number]} and {name}")
        names[number] = name
    for name, number in added.items():
        # The library gives another one where ids are taken, or leave a gap.
        if vocabulary.get(name) != number:
            raise UserError(
                f"{start} gives the added token {name} the id {number}, which is taken or leaves "
                f"out others: the tokenizers library makes it {vocabulary.get(name)}"
            )
    if missing := missing_ids(set(names)):
        told_of = some_of(missing)
        raise UserError(
            f"{start} has the ids 0 to {max(names)}, but no token for {told_of}"
            f"{', ...' if len(missing) > 7 else ''}: entries are missing"
        )


def _end_of_document(
    vocabulary: dict[str, int],
    added: dict[str, int],
    path: Path,
    asked: str | int | None,
    folder: Path | None,
) -> int:
    """Its id, by what the user says, what the folder says, or a usual name."""
    if isinstance(asked, int):
        if not 0 <= asked < len(vocabulary):
            raise UserError(
                f"data.tokenizer.eod is {asked}, but {path} has the ids 0 to {len(vocabulary) - 1}"
            )
        return asked
    source, told_by = _eos_token(folder) if asked is None and folder else (None, asked)
    for candidate in [told_by] if told_by else USUAL_ENDS:
        if candidate in vocabulary:
            return vocabulary[candidate]
    where = f" (`eos_token` of {source})" if source else ""
    looked = f"{told_by}{where}" if told_by else "any of " + " ".join(USUAL_ENDS)
    raise UserError(
        f"data.tokenizer.eod: {path} has no token {looked}: name the one to use, {_names(added)}"
    )


def _eos_token(folder: Path) -> tuple[Path | None, str | None]:
    """What a folder says ends a text, and in which file. Transformers reads the first before the
    second."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        if not file.is_file():
            continue
        with told(f"data.tokenizer.path: {file} cannot be read"):
            content: Any = json.loads(read_bytes(file).decode())
            token = content.get("eos_token")
            token = token.get("content") if isinstance(token, dict) else token
        if token:
            return file, str(token)
    return None, None


def _names(added: dict[str, int]) -> str:
    listed = some_of(f"{name} ({number})" for name, number in added.items())
    return f"of {listed}" if listed else "of which it has none"
