"""A long document is tokenised in parts: their tokens are those of the whole."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnres_train.config.data_schema import CorpusConfig, DataConfig, TokenizerConfig
from attnres_train.data.corpora.cutting import place_to_cut
from attnres_train.data.corpora.reader import find_corpora
from attnres_train.data.tokenizers.hugging_face import train_bpe
from attnres_train.data.tokenizers.patterns import FAMILIES
from attnres_train.data.tokenizers.tokenizer import Tokenizer
from tests.data.tiny import sentence

# What expressions split by: words, numbers, contractions, marks, scripts without spaces.
PIECES = [
    *("word", "Word's", "it'll", "naïve", "12345", "3.14", "é", "नमस्ते", "汉字", "汉字。", "。"),
    *("...", "x_1", "(", ")", "#", "'s", "\n", "\n\n", "\r\n", " ", "  ", "    ", "\t", "\u3000"),
]
TEXTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=60).map("".join)


def cut(text: str, size: int) -> list[str]:
    """As the reader does, of ``size`` characters at least."""
    parts = []
    while len(text) > size:
        # The reader sees no further, either.
        place = place_to_cut(text[:size])
        parts.append(text[:place])
        text = text[place:]
    return [*parts, text]


def is_sure(before: str, after: str) -> bool:
    """Whether two parts are cut apart at a place of the kinds that promise something."""
    alone = before.endswith("\n") and not before[-2:-1].isspace() and not after[0].isspace()
    return (after[0] == " " and before[-1].isalnum()) or (alone and len(before) > 1)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> list[Tokenizer]:
    """Trained here, and of ranks with the expressions of each family: bytes, and some merges that
    would reach across a split."""
    tiktoken = pytest.importorskip("tiktoken")
    folder = tmp_path_factory.mktemp("tokenizers")
    rng = random.Random(0)
    texts = ["".join(rng.choices(PIECES, k=200)) for _ in range(50)]
    train_bpe(texts, 600, folder / "tokenizer.json")
    merges = [b" w", b"\n\n", b"\n ", b"  ", b" \n", b"e\n", b"d ", b".\n", b"s ", b"12", b"345"]
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {merge: 256 + number for number, merge in enumerate(merges)}

    class ByRanks:
        def __init__(self, expression: str) -> None:
            self.encoding = tiktoken.Encoding(
                "tiny", pat_str=expression, mergeable_ranks=ranks, special_tokens={}
            )

        def encode(self, text: str) -> list[int]:
            return self.encoding.encode_ordinary(text)

    trained = Tokenizer(folder / "tokenizer.json", TokenizerConfig(kind="bpe", vocab_size=600))
    return [trained, *(ByRanks(family.expression) for family in FAMILIES.values())]


@given(text=TEXTS, size=st.integers(2, 40))
def test_parts_have_the_tokens_of_the_whole(tokenizers, text, size):
    """Wherever there is a place that says so; other places join two parts again."""
    parts = cut(text, size)
    assert "".join(parts) == text and all(parts)
    joined = parts[:1]
    for part in parts[1:]:
        if is_sure(joined[-1], part):
            joined.append(part)
        else:
            joined[-1] += part
    for tokenizer in tokenizers:
        whole = tokenizer.encode(text)
        assert [token for part in joined for token in tokenizer.encode(part)] == whole


@pytest.mark.parametrize(
    ("text", "before"),
    [
        ("two words and", "two words"),
        ("one line\nand\n\n", "one"),
        ("汉字。\n汉字。\n汉", "汉字。\n汉字。\n"),
        ("汉字\n\n汉字\n", "汉字\n\n汉字\n"),  # nothing promises anything: after a line
        ("nothing", "nothing"),
        ("word " + "x" * 9000, "word"),  # far from the end, but there
    ],
)
def test_the_places(text, before):
    assert text[: place_to_cut(text)] == before


def test_a_file_of_ordinary_text_is_tokenised_as_a_whole(tmp_path: Path, monkeypatch, tokenizers):
    text = "".join(f"{sentence(number)}.\n\n  {sentence(-~number)}\n" for number in range(40))
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr("attnres_train.data.corpora.text.PASSAGE_CHARS", 90)
    config = DataConfig(corpus=[CorpusConfig(kind="text", path=str(tmp_path / "a.txt"))])
    (corpus,) = find_corpora(config)
    passages = [passage.text for passage in corpus.passages(corpus.files[0])]
    assert len(passages) > 40
    for tokenizer in tokenizers:
        ids = [token for passage in passages for token in tokenizer.encode(passage)]
        assert ids == tokenizer.encode(text)
