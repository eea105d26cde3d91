from __future__ import annotations

import base64
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnres_train.config.data_schema import TokenizerConfig
from attnres_train.data.tokenizers.hugging_face import END_OF_DOCUMENT, train_bpe
from attnres_train.data.tokenizers.tokenizer import Tokenizer
from attnres_train.errors import UserError
from tests.data.tiny import sentence


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe((sentence(number) for number in range(50)), 300, path)
    return path


@pytest.fixture(scope="module")
def bpe(bpe_file):
    return Tokenizer(bpe_file, TokenizerConfig())


def test_bpe_size_and_compression(bpe):
    assert bpe.vocab_size == 300
    text = sentence(7)
    assert len(bpe.encode(text)) < len(text) / 2


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bpe_round_trip(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert all(0 <= token < bpe.vocab_size and token != bpe.eod for token in ids)
    assert bpe.encode_batch([text, text]) == [ids, ids]


def test_training_is_deterministic(bpe_file, tmp_path):
    train_bpe((sentence(number) for number in range(50)), 300, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == bpe_file.read_text()


def test_a_document_cannot_end_itself(bpe):
    text = f"a {END_OF_DOCUMENT} b"
    assert bpe.eod not in bpe.encode(text)
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.decode([bpe.eod]) == END_OF_DOCUMENT


def test_digest_is_the_contents(bpe, bpe_file, tmp_path):
    copy = tmp_path / "copy.json"
    copy.write_bytes(bpe_file.read_bytes())
    assert Tokenizer(copy, TokenizerConfig()).digest == bpe.digest
    train_bpe([sentence(1)], 270, copy)
    assert Tokenizer(copy, TokenizerConfig()).digest != bpe.digest


def test_end_of_document_by_name_and_id(bpe, bpe_file):
    def load(eod):
        return Tokenizer(bpe_file, TokenizerConfig(kind="file", path=str(bpe_file), eod=eod))

    assert load(None).eod == bpe.eod == load(0).eod == load(END_OF_DOCUMENT).eod
    # A text may hold these.
    for eod in ("!", bpe.encode("!")[0], 17):
        with pytest.raises(
            UserError, match=r"data\.tokenizer\.eod: .* a document could end itself"
        ):
            load(eod)
    with pytest.raises(UserError, match=r"data\.tokenizer\.eod: .* has no token <nope>"):
        load("<nope>")
    with pytest.raises(UserError, match=r"data\.tokenizer\.eod is 300, .* has the ids 0 to 299"):
        load(300)


def test_a_tokenizer_without_a_usual_end(bpe_file, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(bpe_file.read_text().replace(END_OF_DOCUMENT, "<stop>"))
    with pytest.raises(UserError, match=r"has no token any of <\|endoftext\|> .*name the one"):
        Tokenizer(file, TokenizerConfig(kind="file"))
    assert Tokenizer(file, TokenizerConfig(kind="file", eod="<stop>")).eod == 0


def test_added_ids_with_gaps_count_for_the_vocabulary(bpe_file, tmp_path):
    content = json.loads(bpe_file.read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 300, "content": "<more>"})
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content))
    assert Tokenizer(file, TokenizerConfig(kind="file")).vocab_size == 301


def test_broken_tokenizer_json(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(UserError, match=rf"data\.tokenizer\.path: {file} is no tokenizer\.json"):
        Tokenizer(file, TokenizerConfig(kind="file"))


def ranks(*merges: bytes) -> str:
    tokens = [bytes([byte]) for byte in range(256)] + list(merges)
    return "".join(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens))


@pytest.fixture
def rank_file(tmp_path):
    pytest.importorskip("tiktoken")
    file = tmp_path / "ranks.tiktoken"
    file.write_text(ranks(b"th", b"the", b" t", b"e "))
    return file


def test_tiktoken(rank_file):
    tokenizer = Tokenizer(rank_file, TokenizerConfig(kind="tiktoken"))
    assert (tokenizer.vocab_size, tokenizer.eod) == (261, 260)
    # GPT-2's pattern splits before spaces, so "e " is never merged.
    assert tokenizer.encode("e the") == [ord("e"), ord(" "), 257]
    text = f"é𝄞 the {END_OF_DOCUMENT}"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eod not in tokenizer.encode(text)
    assert tokenizer.decode([257, tokenizer.eod]) == f"the{END_OF_DOCUMENT}"


def test_tiktoken_pattern_and_end(rank_file):
    settings = TokenizerConfig(kind="tiktoken", pattern=r".+")
    tokenizer = Tokenizer(rank_file, settings)
    assert tokenizer.encode("e the") == [259, 257]
    settings = settings.model_copy(update={"special_tokens": {"[EOS]": 260}, "eod": "[EOS]"})
    assert Tokenizer(rank_file, settings).decode([260]) == "[EOS]"
    assert Tokenizer(rank_file, TokenizerConfig(kind="tiktoken", eod=300)).vocab_size == 301
    with pytest.raises(
        UserError, match=r"data\.tokenizer\.eod is 0, but .* has no such special id"
    ):
        Tokenizer(rank_file, TokenizerConfig(kind="tiktoken", eod=0))


@pytest.mark.parametrize(
    ("content", "message"),
    [("dGhl 0\ndGhl\n", "line 2 is no tiktoken rank"), ("", "is empty"), ("? x", "line 1 is no")],
)
def test_broken_rank_file(rank_file, content, message):
    rank_file.write_text(content)
    with pytest.raises(UserError, match=message):
        Tokenizer(rank_file, TokenizerConfig(kind="tiktoken"))


def test_tiktoken_absent(rank_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match=r"pip install 'attnres-train\[data\]'"):
        Tokenizer(rank_file, TokenizerConfig(kind="tiktoken"))
