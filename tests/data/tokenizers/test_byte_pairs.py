"""A rank file as a `tokenizer.json`: the same ids for any text, the same special tokens."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from attnres_train.data.tokenizers.byte_pairs import _CHARACTERS
from attnres_train.data.tokenizers.hugging_face import train_bpe
from attnres_train.data.tokenizers.patterns import FAMILIES
from attnres_train.data.tokenizers.released import write_tokenizer
from tests.data.tokenizers.files import BYTES, opened, rank_lines

tiktoken = pytest.importorskip("tiktoken")
TEXTS = (
    "The weights of what was read say where it's from. They'll show WE'D 12,345.67 of them.",
    "def read(sources):\n    return sum(w * s for w, s in sources)  # over depth\n\n\n",
    "Die Straße, naïve Ωμέγα und Привет мир: 漢字とかな 中文字符 العربية हिन्दी \U0001f680\r\n",
)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A rank file with merges that were learnt from texts."""
    folder = tmp_path_factory.mktemp("ranks")
    train_bpe(TEXTS * 40, 700, folder / "tokenizer.json")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    number = {character: byte for byte, character in enumerate(_CHARACTERS)}
    joined = [
        bytes(number[c] for c in token)
        for token in sorted(vocabulary, key=vocabulary.get)
        if len(token) > 1 and set(token) <= number.keys() and token != "<|endoftext|>"
    ]
    assert len(joined) > 150
    file = folder / "ranks.tiktoken"
    file.write_bytes(rank_lines([*BYTES, *joined]))
    return file


def as_json(file, pattern):
    own = opened(
        file,
        "tiktoken",
        pattern=pattern,
        special_tokens={"<|end|>": 5000, "<|a|>": 5002},
        eod="<|end|>",
    )
    return own, Backend.from_str(own.tokenizer_json())


@pytest.mark.parametrize("pattern", FAMILIES)
def test_any_text_has_the_same_ids(learned, pattern):
    own, other = as_json(learned, pattern)

    @given(st.one_of(st.text(), st.text("ethTHE 's'll12,.\n\r\t ẞ漢か")))
    def same(text):
        assert other.encode(text).ids == own.encode(text)

    same()
    for text in TEXTS:
        ids = own.encode(text)
        assert len(ids) < 0.8 * len(text.encode()), "merges are used"
        assert other.encode(text).ids == ids
        assert other.decode(ids) == text


def test_special_tokens_have_their_ids_whatever_lies_between(learned):
    own, other = as_json(learned, "gpt2")
    assert other.encode("The<|a|> end<|end|>").ids == [
        *own.encode("The"), 5002, *own.encode(" end"), 5000
    ]  # fmt: skip
    assert own.vocab_size == 5003
    assert other.decode([5000]) == ""
    assert other.decode([5000], skip_special_tokens=False) == "<|end|>"


def test_an_export_has_it_with_its_configuration(learned, tmp_path):
    own, _ = as_json(learned, "kimi")
    assert write_tokenizer(own, tmp_path, 128) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    written = Backend.from_file(str(tmp_path / "tokenizer.json"))
    assert written.encode(TEXTS[0]).ids == own.encode(TEXTS[0])
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["model_max_length"]) == ("<|end|>", 128)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [(r"\w+|(?P<a>\W)(?P=a)*", "tokenizers does not take"), (r"[a-z]+|\W", "splits")],
)
def test_an_expression_that_is_taken_otherwise_leaves_the_file(learned, tmp_path, pattern, why):
    own = opened(learned, "tiktoken", pattern=pattern)
    (told,) = write_tokenizer(own, tmp_path, 128)
    assert told.startswith("ranks.tiktoken is data.tokenizer's file")
    assert why in told
    assert (tmp_path / "ranks.tiktoken").read_bytes() == learned.read_bytes()
