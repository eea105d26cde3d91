"""`attnres-train generate`: texts that depend on no batch or pass, whole characters, errors."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch

from attnres_train.__main__ import main
from attnres_train.data.tokenizers.tokenizer import Tokenizer
from attnres_train.inference.decoding import CachedDecoder, generate
from attnres_train.inference.opening import Opened, open_model
from attnres_train.inference.sampling import Sampling
from attnres_train.inference.text import TextStream, complete
from attnres_train.inference.writer import Writer
from attnres_train.model.batch import MicroBatch
from tests.tiny import TinyRuns

GREEDY = Sampling(temperature=0)
PROMPTS = ["One", "A text of several words, and more", "x", "the end of a line\n"]


@pytest.fixture(scope="module")
def run(tiny: TinyRuns) -> Path:
    return tiny.train("opened-1")


@pytest.fixture(scope="module")
def opened(run: Path) -> Opened:
    return open_model(run, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(opened: Opened) -> Tokenizer:
    assert opened.tokenizer is not None
    return opened.tokenizer


@torch.no_grad()
def by_full_passes(opened: Opened, prompt: list[int], count: int) -> list[int]:
    """Greedy, with all tokens anew for every token, and no cache."""
    tokens = list(prompt)
    for _ in range(count):
        batch = MicroBatch.of_tokens(torch.tensor([tokens]))
        tokens.append(int(opened.chunk.logits(batch, {}, None)[0, -1].argmax()))
    return tokens[len(prompt) :]


def texts_of(opened: Opened, prompts: list[list[int]], sampling: Sampling, prefill: int = 512):
    texts: list[list[int]] = [[] for _ in prompts]
    for row, token in generate(CachedDecoder.of(opened.chunk, prefill), prompts, sampling, 12):
        texts[row].append(token)
    return texts


@pytest.mark.parametrize("prefill", [1, 3, 512])
def test_greedy_text_is_that_of_full_passes(
    opened: Opened, tokenizer: Tokenizer, prefill: int
) -> None:
    """Whatever the batch and the passes over the prompts."""
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    expected = [by_full_passes(opened, prompt, 12) for prompt in prompts]
    assert texts_of(opened, prompts, GREEDY, prefill) == expected
    assert [texts_of(opened, [p], GREEDY, prefill)[0] for p in prompts] == expected


def test_drawn_text_is_of_its_number_in_the_batch(opened: Opened, tokenizer: Tokenizer) -> None:
    same = [tokenizer.encode("A")] * 3
    texts = texts_of(opened, same, Sampling(1.0, seed=3))
    assert len(set(map(tuple, texts))) == 3
    assert texts_of(opened, same[:2], Sampling(1.0, seed=3)) == texts[:2]


class Scripted:
    """A decoder whose texts are known."""

    def __init__(self, texts: list[list[int]], vocab_size: int) -> None:
        self.texts, self.vocab_size, self.place = texts, vocab_size, 0
        self.steps: list[int] = []

    def begin(self, prompts, room):
        return self._logits()

    def step(self, tokens):
        assert tokens == [text[self.place] for text in self.texts]
        self.place += 1
        self.steps.append(len(tokens))
        return self._logits()

    def keep(self, rows):
        self.texts = [self.texts[row] for row in rows]

    def _logits(self):
        tokens = torch.tensor([text[self.place] for text in self.texts])
        return torch.nn.functional.one_hot(tokens, self.vocab_size).float()


def test_ends_of_documents(tokenizer: Tokenizer) -> None:
    """A text ends by itself, and is not computed any further; what is not ended is cut."""
    words, size = tokenizer.encode("abcdefgh"), tokenizer.vocab_size
    scripts = [[*words[:2], tokenizer.eod], words[:6], [tokenizer.eod]]
    decoder = Scripted(scripts, size)
    found = complete(decoder, tokenizer, [[1], [2], [3]], GREEDY, 5)
    assert [text.text for text in found] == [
        tokenizer.decode(words[:2]),
        tokenizer.decode(words[:5]),
        "",
    ]
    assert [text.ended for text in found] == [True, False, True]
    assert decoder.steps == [2, 2, 1, 1]
    # More of the model's tokens than the tokenizer has.
    tokens = generate(Scripted([[size + 1]], size + 2), [[1]], GREEDY, 1, None, size)
    assert next(token for _, token in tokens) < size


def test_characters_come_whole(tokenizer: Tokenizer) -> None:
    text = "naïve 🙂 日本語\n"
    tokens = tokenizer.encode(text)
    stream = TextStream(tokenizer, tokenizer.encode("before"))
    pieces = [stream.add(token) for token in tokens]
    assert "".join(pieces) == text
    assert "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.end() == ""
    broken = TextStream(tokenizer, [])
    assert broken.add(tokenizer.encode("日")[0]) == ""
    assert broken.end() == "\ufffd"


def test_the_command(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = ["generate", str(run), "--max-new-tokens", "9"]
    assert main(asked) == 0
    alone = capsys.readouterr()
    assert alone.out.strip()
    assert "9 tokens" in alone.err
    assert main([*asked, "--prompt", "One word", "--seed", "1", "--top-k", "5"]) == 0
    streamed = capsys.readouterr().out
    assert streamed.startswith("One word")
    file = tmp_path / "prompt.txt"
    file.write_text("One word")
    assert main([*asked, "--file", str(file), "--seed", "1", "--top-k", "5", "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert f"One word{line['text']}\n" == streamed
    assert (len(line["tokens"]), line["ended"]) == (9, False)
    assert main([*asked, "--prompt", "One", "--prompt", "Two", "--json"]) == 0
    assert [json.loads(one)["prompt"] for one in capsys.readouterr().out.splitlines()] == [
        "One",
        "Two",
    ]


def test_a_conversation(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"One\n{'long ' * 99}\n\n"))
    assert main(["generate", str(run), "--interactive", "--max-new-tokens", "3"]) == 0
    output = capsys.readouterr()
    assert output.out.count("> ") == 4
    assert output.err.count("[3 tokens") == 2
    assert "error: the prompt has" in output.err


class Leaving(io.StringIO):
    """A screen whose reader leaves once it has a letter of text (``| head``)."""

    def write(self, text: str) -> int:
        if "Onea" in self.getvalue():
            raise BrokenPipeError
        return super().write(text)


def test_a_conversation_ends_with_its_reader(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = io.StringIO("One\nTwo\n")
    monkeypatch.setattr("sys.stdin", asked)
    monkeypatch.setattr("sys.stdout", Leaving())
    decoder = Scripted([tokenizer.encode("abcdefgh")], tokenizer.vocab_size)
    Writer(tokenizer, GREEDY, 5, None).converse(decoder)
    assert asked.read() == "Two\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--prompt", "long " * 99],
            "samples of 32 (train.seq_length): shorten it, or go beyond with --any-length",
        ),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--file", "/no/where"], "--file /no/where cannot be read"),
        (["--device", "cuda:99"], "device cuda:99: there is none here"),
        (["--interactive", "--json"], "leave out --json"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert main(["generate", str(run), *arguments]) == 2
    assert told in capsys.readouterr().err


def test_beyond_the_length_where_it_is_asked_for(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--prompt", "long " * 99, "--any-length", "--max-new-tokens", "2"]
    assert main(["generate", str(run), *asked]) == 0
    assert "2 tokens" in capsys.readouterr().err


def test_runs_without_what_it_needs(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    for folder, told in (("run", "the tokenizer of"), ("other", "holds no complete checkpoint")):
        assert main(["generate", str(tmp_path / folder)]) == 2
        assert told in capsys.readouterr().err
