"""Files of tokenizers that are damaged, or are none: each is told by name before anything is made
of it, whatever the library beneath does with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from attnres_train.data.prepare import prepare
from attnres_train.errors import UserError
from tests.data.tiny import run_config, text_corpus, write_text
from tests.data.tokenizers.files import (
    BYTES,
    added,
    many_ranks,
    pieces,
    rank_lines,
    tokenizer_json,
    words,
)

END = added("</s>", 2)
WORDS = tokenizer_json(words({"?": 0, "a": 1}), END)
RANKS = rank_lines([*BYTES, b"th", b"the"])
NO_CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "eHh4"}


def bpe(vocabulary: dict[str, int], *merges: list[str]) -> dict:
    return {"type": "BPE", "vocab": vocabulary, "merges": list(merges), "unk_token": "?"}


def unigram(*pieces: str, **more) -> dict:
    return {"type": "Unigram", "vocab": [[piece, -1.0] for piece in pieces], **more}


# Name: (kind, what the file holds, what is told after key and file, more settings).
Corruption = tuple[str, bytes | Callable[[], bytes], str, dict]
CORRUPTIONS: dict[str, Corruption] = {
    "json: empty": ("file", b"", "is empty", {}),
    "json: cut short": ("file", WORDS[:-30], "is no tokenizer.json", {}),
    "json: binary": ("file", bytes(range(256)) * 4, "is no tokenizer.json", {}),
    "json: another file": ("file", b'{"model_type": "llama"}', "describes no model", {}),
    "json: no file of text": ("file", json.dumps([1]).encode(), "describes no model", {}),
    "json: words, none for others": (
        "file",
        tokenizer_json(words({"a": 0, "b": 1}), END),
        "has no token for the unknown: unk_token of its WordLevel model is '?'",
        {},
    ),
    "json: unigram, none for others": (
        "file",
        tokenizer_json(unigram("a", "b", unk_id=None), END),
        "has no token for the unknown: unk_id of its Unigram model is None",
        {},
    ),
    "json: merges, none for others": (
        "file",
        tokenizer_json(bpe({"a": 0, "b": 1}), END),
        "has no token for the unknown: unk_token of its BPE model is '?'",
        {},
    ),
    "json: unigram, another unknown": (
        "file",
        tokenizer_json(unigram("a", "b", unk_id=5), END),
        "is no tokenizer.json: Unable to load vocab",
        {},
    ),
    "json: a hole": (
        "file",
        tokenizer_json(words({"?": 0, "a": 1, "b": 7}), added("</s>", 0)),
        "gives the added token </s> the id 0",
        {},
    ),
    "json: a word left out": (
        "file",
        tokenizer_json(words({"?": 0, "</s>": 1, "b": 7}), added("</s>", 1)),
        "has the ids 0 to 7, but no token for 2, 3, 4, 5, 6",
        {},
    ),
    "json: an id of 2**32": (
        "file",
        tokenizer_json(words({"?": 0, "</s>": 2**32 - 1}), added("</s>", 2**32 - 1)),
        "has the ids 0 to 4294967295, but no token for 1, 2,",
        {},
    ),
    "json: an id twice": (
        "file",
        tokenizer_json(words({"?": 0, "a": 1, "b": 1}), END),
        "gives the id 1 twice",
        {},
    ),
    "json: a negative id": (
        "file",
        tokenizer_json(words({"?": 0, "a": -1}), END),
        "is no tokenizer.json: invalid value: integer `-1`",
        {},
    ),
    "json: an added id that is taken": (
        "file",
        tokenizer_json(words({"?": 0, "a": 1}), added("</s>", 1)),
        "gives the added token </s> the id 1",
        {},
    ),
    "json: an added id out of line": (
        "file",
        tokenizer_json(words({"?": 0, "a": 1}), added("</s>", 9)),
        "gives the added token </s> the id 9",
        {},
    ),
    "json: merges of unknown tokens": (
        "file",
        tokenizer_json(bpe({"?": 0, "a": 1}, ["a", "b"]), END),
        "is no tokenizer.json: ",
        {},
    ),
    "json: merges the library panics at": (
        "file",
        tokenizer_json(
            bpe({"?": 0, "a": 1}, ["a", "a"]) | {"continuing_subword_prefix": "####"}, END
        ),
        "is no tokenizer.json: ",
        {},
    ),
    "json: a table the library panics at": (
        "file",
        tokenizer_json(words({"?": 0, "a": 1}), END, normalizer=NO_CHARSMAP),
        "is no tokenizer.json: ",
        {},
    ),
    "json: a broken expression": (
        "file",
        tokenizer_json(
            words({"?": 0, "a": 1}),
            END,
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "("},
                "behavior": "Isolated",
                "invert": False,
            },
        ),
        "is no tokenizer.json: Oniguruma error",
        {},
    ),
    "json: an end that words contain": (
        "file",
        tokenizer_json(words({"?": 0, "</s>": 1})),
        "encodes text that holds '</s>' to its id, 1",
        {},
    ),
    "ranks: empty": ("tiktoken", b"", "is empty", {}),
    "ranks: blank": ("tiktoken", b"\n\n", "is empty", {}),
    "ranks: binary": ("tiktoken", bytes(range(256)) * 4, "line 1 is no tiktoken rank", {}),
    "ranks: a SentencePiece model": ("tiktoken", pieces, "is no tiktoken rank", {}),
    "ranks: cut within a line": ("tiktoken", RANKS[:-5], "line 258 is no tiktoken rank", {}),
    "ranks: cut within a rank": ("tiktoken", RANKS[:-2], "gives the rank 25 twice", {}),
    "ranks: cut within the bytes": ("tiktoken", rank_lines(BYTES[:200]), "single bytes", {}),
    "ranks: a byte left out": (
        "tiktoken",
        rank_lines([(b, n) for n, b in enumerate(BYTES) if n != 65]),
        "has no rank for 1 of the 256 single bytes (0x41)",
        {},
    ),
    "ranks: a rank twice": (
        "tiktoken",
        rank_lines([*BYTES, (b"th", 97)]),
        "gives the rank 97 twice, to b'a' and to b'th'",
        {},
    ),
    "ranks: a token twice": (
        "tiktoken",
        rank_lines([*BYTES, b"th", b"th"]),
        "line 258: b'th' is there twice",
        {},
    ),
    "ranks: a line left out": (
        "tiktoken",
        rank_lines([*BYTES, (b"the", 257)]),
        "leaves out ranks below its last, 257: 256",
        {},
    ),
    "ranks: a rank of 2**40": (
        "tiktoken",
        rank_lines([*BYTES, (b"the", 2**40)]),
        "line 257 is no tiktoken rank: 1099511627776 is no rank",
        {},
    ),
    "ranks: a negative rank": (
        "tiktoken",
        rank_lines([*BYTES, (b"the", -1)]),
        "line 257 is no tiktoken rank: -1 is no rank",
        {},
    ),
    "ranks: more than the model has": (
        "tiktoken",
        RANKS,
        "has a vocabulary of 200001, but model.vocab_size is 163840",
        {"special_tokens": {"<|endoftext|>": 200_000}},
    ),
    "ranks: Kimi's, cut at a line": (
        "tiktoken",
        many_ranks(160_000),
        "has 160,000 ranks, but data.tokenizer.pattern kimi is for files of 163,584",
        {"pattern": "kimi"},
    ),
    "pieces: empty": ("sentencepiece", b"", "is empty", {}),
    "pieces: cut short": ("sentencepiece", lambda: pieces()[:-5], "is no SentencePiece model", {}),
    "pieces: cut in half": (
        "sentencepiece",
        lambda: pieces()[:1000],
        "is no SentencePiece model",
        {},
    ),
    "pieces: zeros": ("sentencepiece", bytes(300), "is no SentencePiece model", {}),
    "pieces: a tokenizer.json": ("sentencepiece", WORDS, "is no SentencePiece model", {}),
    "pieces: without an end": (
        "sentencepiece",
        lambda: pieces(eos_id=-1),
        "names no end of sentence",
        {},
    ),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_told_by_name_and_not_trained_on(name, tmp_path, capfd):
    kind, content, told, settings = CORRUPTIONS[name]
    if kind != "file":
        pytest.importorskip(kind)
    file = tmp_path / "tokenizer"
    file.write_bytes(content if isinstance(content, bytes) else content())
    corpus = text_corpus(write_text(tmp_path / "texts", 4))
    config = run_config(tmp_path / "cache", [corpus], {"kind": kind, "path": str(file), **settings})
    config.model.vocab_size = 163840
    with pytest.raises(UserError) as caught:
        prepare(config, progress=False)
    message = str(caught.value)
    assert message.startswith("data.tokenizer.") and told in message
    assert str(file) in message and len(message) < 700
    made = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert made <= {"lock"}


def test_there_are_twenty_that_need_no_optional_package():
    kinds = [kind for kind, *_ in CORRUPTIONS.values()]
    assert kinds.count("file") >= 20


@pytest.mark.parametrize("kind", ["file", "tiktoken", "sentencepiece"])
def test_a_folder_a_missing_file_and_one_that_cannot_be_read(kind, tmp_path):
    corpus = text_corpus(write_text(tmp_path / "texts", 4))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tiktoken.model").write_bytes(RANKS)

    def told(path: Path) -> str:
        settings = {"kind": kind, "path": str(path)}
        with pytest.raises(UserError) as caught:
            prepare(run_config(tmp_path / "cache", [corpus], settings), progress=False)
        return str(caught.value)

    wanted = "has no tokenizer.json" if kind == "file" else "is no file"
    start = f"data.tokenizer.path: the folder {folder} {wanted}; {folder} holds tiktoken.model"
    assert told(folder) == start
    assert told(folder / "absent").startswith(
        f"data.tokenizer.path: there is no file {folder / 'absent'}; {folder} holds tiktoken.model"
    )
