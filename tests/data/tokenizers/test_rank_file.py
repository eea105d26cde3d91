"""Rank files: what ends a document, and how a family of models splits text."""

from __future__ import annotations

import pytest

from attnres_train.config import check_config
from attnres_train.data.prepare import prepare
from attnres_train.data.tokenizers.patterns import FAMILIES
from attnres_train.errors import UserError
from tests.data.tiny import run_config, text_corpus
from tests.data.tokenizers.files import BYTES, many_ranks, opened, rank_lines, refusal

tiktoken = pytest.importorskip("tiktoken")
MERGES = (b"th", b"the", b" t", b"e ")


@pytest.fixture
def ranks(tmp_path):
    file = tmp_path / "ranks.tiktoken"
    file.write_bytes(rank_lines([*BYTES, *MERGES]))
    return file


@pytest.fixture(scope="module")
def kimi(tmp_path_factory):
    """A file with as many ranks as Kimi's."""
    file = tmp_path_factory.mktemp("kimi") / "tiktoken.model"
    file.write_bytes(many_ranks(163584))
    return file


class TestEndOfDocument:
    def test_after_the_ranks_where_nothing_else_is_said(self, ranks):
        assert opened(ranks, "tiktoken").eod == 260
        assert opened(ranks, "tiktoken", eod="<|endoftext|>").eod == 260

    @pytest.mark.parametrize("name", ["[BOS]", "[EOS]", "<|im_end|>", "the"])
    def test_a_name_that_nothing_gives_an_id(self, ranks, name):
        told = refusal(ranks, "tiktoken", eod=name)
        assert told.startswith(f"data.tokenizer.eod is {name!r}, but {ranks} has no special token")
        assert "there are <|endoftext|> (260)" in told and "data.tokenizer.special_tokens" in told

    def test_special_tokens_of_the_users(self, ranks):
        named = {"[BOS]": 260, "[EOS]": 261, "[PAD]": 270}
        tokenizer = opened(ranks, "tiktoken", special_tokens=named, eod="[EOS]")
        assert (tokenizer.eod, tokenizer.vocab_size) == (261, 271)
        assert tokenizer.decode([257, 260, 270]) == "the[BOS][PAD]"
        assert opened(ranks, "tiktoken", special_tokens=named, eod=270).eod == 270
        told = refusal(ranks, "tiktoken", special_tokens=named)
        assert "has no <|endoftext|>: say which ends a document, [BOS] (260), [EOS] (261)" in told
        told = refusal(ranks, "tiktoken", special_tokens=named, eod=262)
        assert "there are [BOS] (260), [EOS] (261), [PAD] (270)" in told

    def test_a_token_that_text_is_made_of(self, ranks):
        assert "there are <|endoftext|> (260)" in refusal(ranks, "tiktoken", eod=257)
        told = refusal(ranks, "tiktoken", special_tokens={"[EOS]": 257}, eod="[EOS]")
        assert "[EOS] has the id 257, which is the rank of b'the'" in told

    @pytest.mark.parametrize(
        ("special_tokens", "told"),
        [
            ({}, "must give names to ids"),
            ({"a": 300, "b": 300}, "gives the id 300 to more than one name"),
            ({"a": 2**31}, "has the id 2147483648"),
        ],
    )
    def test_special_tokens_that_cannot_be(self, ranks, special_tokens, told):
        settings = {"kind": "tiktoken", "path": str(ranks), "special_tokens": special_tokens}
        with pytest.raises(UserError, match=f"data.tokenizer.special_tokens {told}"):
            check_config(run_config(ranks.parent, [text_corpus(ranks)], settings))

    @pytest.mark.parametrize("name", ["[EOS]", "<|endoftext|>"])
    def test_no_document_can_contain_it(self, ranks, name):
        tokenizer = opened(ranks, "tiktoken", special_tokens={name: 261}, eod=name)
        for text in (name, f"a {name} b", f"a{name}b"):
            assert tokenizer.eod not in tokenizer.encode(text)
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode([261]) == name

    def test_special_tokens_among_the_ranks(self, ranks):
        """As in p50k."""
        ranks.write_bytes(rank_lines([*BYTES, (b"th", 256), (b"the", 258)]))
        named = {"<|endoftext|>": 257}
        assert opened(ranks, "tiktoken", special_tokens=named).vocab_size == 259
        assert "leaves out ranks below its last, 258: 257" in refusal(ranks, "tiktoken")


class TestKimi:
    def test_its_special_tokens(self, kimi):
        tokenizer = opened(kimi, "tiktoken", pattern="kimi")
        # moonshotai/Kimi-Linear-48B-A3B-Instruct, config.json: vocab_size, and the ids around.
        assert (tokenizer.eod, tokenizer.vocab_size) == (163585, 163840)
        names = "[BOS][EOS]<|im_end|><|reserved_token_163589|>"
        assert tokenizer.decode([163584, 163585, 163586, 163589]) == names
        assert tokenizer.decode([163838, 163839]) == "[UNK][PAD]"
        assert opened(kimi, "tiktoken", pattern="kimi", eod="<|im_end|>").eod == 163586
        text = "[EOS] <|im_end|>"
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert max(tokenizer.encode(text)) < 256
        told = refusal(kimi, "tiktoken", pattern="kimi", eod="[END]")
        assert "has no special token [END]: there are [BOS] (163584), [EOS] (163585)" in told

    def test_the_default_pattern_is_not_its_own(self, kimi):
        told = refusal(kimi, "tiktoken")
        assert told.startswith("data.tokenizer.pattern is not set") and "set it to kimi" in told
        # What a run of before was begun with.
        assert opened(kimi, "tiktoken", pattern="gpt2").eod == 163584

    def test_a_file_cut_short(self, ranks):
        for name in ("kimi", "cl100k"):
            told = refusal(ranks, "tiktoken", pattern=name)
            assert "260 ranks" in told and f"data.tokenizer.pattern {name}" in told
        named = {"[EOS]": 260}
        assert opened(ranks, "tiktoken", pattern="kimi", special_tokens=named).eod == 260


def split(name: str, text: str) -> list[str]:
    """What ``name`` merges, each by itself: with every run of bytes a token."""
    whole = text.encode()
    runs = {whole[a:b] for a in range(len(whole)) for b in range(a + 2, len(whole) + 1)}
    ranks = {token: rank for rank, token in enumerate([*BYTES, *sorted(runs, key=len)])}
    encoding = tiktoken.Encoding(
        name, pat_str=FAMILIES[name].expression, mergeable_ranks=ranks, special_tokens={}
    )
    return [encoding.decode([token]) for token in encoding.encode_ordinary(text)]


class TestPatterns:
    @pytest.mark.parametrize(
        ("text", "gpt2", "cl100k", "kimi"),
        [
            ("it's 1234", "it|'s| 1234", "it|'s| |123|4", "it's| |123|4"),
            ("fooBar", "fooBar", "fooBar", "foo|Bar"),
            ("a中文b", "a中文b", "a中文b", "a|中文|b"),
            ("x\n\n  y", "x|\n\n |\u0020y", "x|\n\n| | y", "x|\n\n| | y"),
            ("WE'LL go", "WE|'|LL| go", "WE|'LL| go", "WE'LL| go"),
            ("a.b", "a|.|b", "a|.b", "a|.b"),
        ],
    )
    def test_where_they_split(self, text, gpt2, cl100k, kimi):
        for name, expected in {"gpt2": gpt2, "cl100k": cl100k, "kimi": kimi}.items():
            assert "|".join(split(name, text)) == expected, name

    @pytest.mark.parametrize("name", FAMILIES)
    def test_they_leave_nothing_out(self, name):
        ranks = {token: rank for rank, token in enumerate(BYTES)}
        encoding = tiktoken.Encoding(
            name, pat_str=FAMILIES[name].expression, mergeable_ranks=ranks, special_tokens={}
        )
        plane = [chr(point) for point in range(0x3400) if not 0xD800 <= point < 0xE000]
        apart = [between.join(plane) for between in ("", "\n", " ", "a")]
        for text in (*apart, "𝄞\U0010ffff"):
            assert encoding.decode(encoding.encode_ordinary(text)) == text

    @pytest.mark.parametrize(
        ("pattern", "told"),
        [
            ("Kimi", "did you mean kimi?"),
            ("cl100k_base", "did you mean cl100k?"),
            ("words", "neither a name (gpt2, cl100k, kimi) nor a regular expression"),
            ("", "data.tokenizer.pattern is empty"),
        ],
    )
    def test_a_name_that_there_is_not(self, ranks, pattern, told):
        settings = {"kind": "tiktoken", "path": str(ranks), "pattern": pattern}
        with pytest.raises(UserError) as caught:
            check_config(run_config(ranks.parent, [text_corpus(ranks)], settings))
        assert told in str(caught.value)

    def test_of_other_kinds(self, ranks):
        for key, value in {"pattern": "kimi", "special_tokens": {"a": 1}}.items():
            config = run_config(ranks.parent, [text_corpus(ranks)], {"kind": "bpe", key: value})
            with pytest.raises(UserError, match=f"data.tokenizer.{key} is not read with kind bpe"):
                check_config(config)

    def test_no_expression(self, ranks):
        told = refusal(ranks, "tiktoken", pattern="(")
        assert told.startswith("data.tokenizer.pattern '(' cannot be used with") and "paren" in told

    def test_another_pattern_is_another_cache(self, ranks):
        default = opened(ranks, "tiktoken")
        assert opened(ranks, "tiktoken", pattern="gpt2").digest == default.digest
        assert opened(ranks, "tiktoken", pattern=r".+|\n").digest != default.digest
        assert opened(ranks, "tiktoken", pattern=r"\s+|\S+").encode("the e ") == [257, 32, 101, 32]

    def test_what_it_leaves_out_is_counted_and_told(self, ranks, tmp_path, capsys):
        (tmp_path / "text.txt").write_text("the cat\n" * 100 + "é𝄞!" * 10)
        settings = {"kind": "tiktoken", "path": str(ranks), "pattern": r"\w+"}
        config = run_config(tmp_path / "cache", [text_corpus(tmp_path / "text.txt")], settings)
        config.data.split, config.train.eval_interval = (1.0, 0.0), 0
        for _ in range(2):  # when it is made, and when it is found
            prepare(config)
            # Spaces and ends of line, and of é𝄞! the last two.
            assert "WARNING: 220 of 830 characters (27 %) were left out" in capsys.readouterr().err
        config.data.tokenizer.pattern = r"(?s:.)+"
        prepare(config)
        assert "left out" not in capsys.readouterr().err
