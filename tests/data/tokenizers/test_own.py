"""Tokenizers of the user's, in a file outside the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnres_train.config import RunConfig, check_config, load_config
from attnres_train.data.indexed import TokenSequences
from attnres_train.data.loader import open_data
from attnres_train.data.prepare import open_tokenizer, prepare
from attnres_train.errors import UserError
from tests.config.helpers import error_of
from tests.data.tiny import cached, run_config, text_corpus, write_text

BYTES = '''
from attnres_train.config.section import Section
from attnres_train.data.tokenizers.kind import TokenizerKind


class Bytes(TokenizerKind):
    """Bytes of UTF-8; 256 ends a document."""

    vocab_size, eod = 257, 256

    class Options(Section):
        lower: bool = False
        """Lower case alone."""

    def open(self, path):
        return self

    def encode_batch(self, texts):
        if self.options.lower:
            texts = [text.lower() for text in texts]
        return [list(text.encode()) for text in texts]

    def decode(self, ids):
        return bytes(byte for byte in ids if byte != self.eod).decode(errors="replace")
'''
CHARACTERS = '''
from attnres_train.config.section import Section
from attnres_train.data.tokenizers.kind import TokenizerKind


class Characters(TokenizerKind):
    """The characters of the corpora; 0 stands for others, 1 ends a document."""

    trains_on_corpora = True

    class Options(Section):
        most: int = 1000

    def train(self, texts, path):
        path.write_text("".join(sorted(set().union(*texts)))[: self.options.most])

    def open(self, path):
        return Opened(path.read_text())


class Opened:
    eod = 1

    def __init__(self, characters):
        self.characters = "?|" + characters
        self.vocab_size = len(self.characters)

    def encode_batch(self, texts):
        return [[max(0, self.characters.find(c, 2)) for c in text] for text in texts]

    def decode(self, ids):
        return "".join(self.characters[id] for id in ids)
'''


@pytest.fixture
def texts(tmp_path) -> Path:
    return write_text(tmp_path / "Texts", 12)


@pytest.fixture
def configured(lab, tmp_path, texts):
    """A run with the tokenizer ``name`` of a module with some source."""

    def config(source: str, name: str = "Bytes", **options) -> RunConfig:
        lab(source)
        settings = {"kind": f"my_lab:{name}", "options": options}
        return run_config(tmp_path / "cache", [text_corpus(texts)], settings)

    return config


def documents(config: RunConfig) -> list[str]:
    prepared = prepare(config, progress=False)
    tokenizer = open_tokenizer(config, prepared)
    data = TokenSequences(prepared.sources[0].prefixes)
    return [tokenizer.decode(data.get(number)[:-1].tolist()) for number in range(12)]


def refusal(config: RunConfig) -> str:
    with pytest.raises(UserError) as caught:
        prepare(config, progress=False)
    return str(caught.value)


def test_bytes_from_text_to_batches(configured, texts):
    config = configured(BYTES)
    check_config(config)
    prepared = prepare(config, progress=False)
    assert (prepared.tokenizer_path, prepared.eod) == (None, 256)
    assert documents(config) == [file.read_text() for file in sorted(texts.iterdir())]
    tokens = open_data(config, prepare(config, progress=False)).micro_batches(0, 0, 1)[0]["tokens"]
    assert tokens.shape == (1, 16) and tokens.max() <= 256


def test_the_cache_knows_options_and_version(configured, texts, tmp_path):
    (texts / "000.txt").write_text("Upper case")
    first = prepare(configured(BYTES), progress=False)
    before = cached(tmp_path / "cache")
    assert prepare(configured(BYTES), progress=False) == first
    assert cached(tmp_path / "cache") == before
    assert documents(configured(BYTES, lower=True))[0] == "upper case"
    assert documents(configured(BYTES))[0] == "Upper case"
    changed = BYTES.replace("vocab_size, eod", "version = 1\n    vocab_size, eod")
    changed = changed.replace("list(text.encode())", "list(text[1:].encode())")
    assert documents(configured(changed))[0] == "pper case"


def test_one_that_is_trained_on_the_corpora(configured, texts, tmp_path, capsys):
    config = configured(CHARACTERS, "Characters")
    check_config(config)
    assert documents(config) == [file.read_text() for file in sorted(texts.iterdir())]
    capsys.readouterr()
    first = prepare(configured(CHARACTERS, "Characters"))
    assert "training a" not in capsys.readouterr().err
    assert Path(first.tokenizer_path).is_relative_to(tmp_path / "cache" / "tokenizers")
    other = prepare(configured(CHARACTERS, "Characters", most=5))
    assert "training a tokenizer of kind my_lab:Characters" in capsys.readouterr().err
    assert other.tokenizer_path != first.tokenizer_path
    assert open_tokenizer(configured(CHARACTERS, "Characters", most=5), other).vocab_size == 7


def test_one_with_a_file(configured, tmp_path):
    source = CHARACTERS.replace("trains_on_corpora", "needs_path")
    config = configured(source, "Characters")
    config.data.tokenizer.path = str(tmp_path / "characters")
    with pytest.raises(UserError, match=r"data\.tokenizer\.path: there is no file .*/characters"):
        check_config(config)
    config.data.tokenizer.path = None
    told = "data.tokenizer.path is missing: a tokenizer of kind my_lab:Characters needs one"
    with pytest.raises(UserError, match=told):
        check_config(config)
    (tmp_path / "characters").write_text("abc")
    config.data.tokenizer.path = str(tmp_path / "characters")
    check_config(config)
    first = prepare(config, progress=False)
    assert open_tokenizer(config, first).vocab_size == 5
    (tmp_path / "characters").write_text("abcd")
    assert prepare(config, progress=False).sources[0].digest != first.sources[0].digest


def test_options_are_checked(run_file, lab):
    lab(BYTES)
    tokenizer = "data.tokenizer={kind: 'my_lab:Bytes', options: {lower: true"
    message = error_of(run_file, tokenizer + ", uper: true}}")
    assert "data.tokenizer.options.uper (command line): unknown key" in message
    assert load_config(run_file, [tokenizer + "}}"]).data.tokenizer.options.lower is True


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("return self\n", "return 1 / 0\n", "failed at opening the tokenizer: ZeroDivisionError"),
        ("[list(text", "[lisst(text", "failed at encoding: NameError: name 'lisst' is not"),
        ("return self\n", "return None\n", "failed at opening the tokenizer: AttributeError"),
        ("for text in texts]\n\n", "for text in texts[1:]]\n\n", "gave 11 lists of ids for 12"),
        ("list(text.encode())", "[65_616]", "token id 65616, but its vocabulary has the ids 0 to"),
        ("list(text.encode())", "[-1]", "data.tokenizer gave the token id -1, but its vocabulary"),
        ("list(text.encode())", "[256]", "eod is 256, but my_lab:Bytes encodes a text to it, so a"),
        # As pyo3 raises it where Rust panics: no Exception.
        (
            "return self\n",
            "raise type('PanicException', (BaseException,), {})('no entry')\n",
            "failed at opening the tokenizer: PanicException: no entry",
        ),
        ("257, 256", "257, 257", "is 257, but my_lab:Bytes has the ids 0 to 256"),
        ("257, 256", "600, 256", "kind my_lab:Bytes has a vocabulary of 600, but model.vocab_size"),
        ("def open", "def opened", "my_lab:Bytes has no method open(path)"),
        ("vocab_size, eod", "trains_on_corpora = True\n    vocab_size, eod", "no method train(te"),
    ],
)
def test_errors_name_the_kind(configured, old, new, message):
    assert old in BYTES
    told = refusal(configured(BYTES.replace(old, new)))
    assert told.startswith("data.tokenizer") and message in told
    if "failed at" in message:
        assert "my_lab:Bytes" in told and "line " in told
