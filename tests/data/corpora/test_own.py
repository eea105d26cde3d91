"""A corpus reader of the user's, in a file outside the package."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from attnres_train.config import ConfigError, RunConfig, check_config, load_config
from attnres_train.data.corpora.reader import corpus_readers
from attnres_train.data.indexed import TokenSequences
from attnres_train.data.loader import open_data
from attnres_train.data.prepare import open_tokenizer, prepare
from attnres_train.errors import UserError
from tests.config.helpers import error_of
from tests.data.tiny import cached, run_config, sentence, write_indexed

CSV = '''
import csv

from attnres_train.config.section import Section
from attnres_train.data.corpora.reader import CorpusReader, Passage


class Csv(CorpusReader):
    """CSV files, a document per row."""

    suffixes = (".csv",)

    class Options(Section):
        column: str
        """Column with the document."""

    def passages(self, file):
        with open(file, newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                yield Passage(row[self.options.column])
'''
TITLES = [f"title {number}" for number in range(30)]
BODIES = [sentence(number) for number in range(30)]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A folder with a CSV file, and one that is none of the corpus."""
    folder = tmp_path / "rows"
    folder.mkdir()
    lines = [f"{title},{body}" for title, body in zip(TITLES, BODIES, strict=True)]
    (folder / "rows.csv").write_text("\n".join(["title,body", *lines, ""]))
    (folder / "notes.txt").write_text("no,row\n")
    return folder


@pytest.fixture
def configured(lab, tmp_path, rows):
    """A run on that folder; ``options`` of the kind."""
    lab(CSV)

    def config(kind: str = "my_lab:Csv", **options) -> RunConfig:
        corpus = {"kind": kind, "path": str(rows), "options": options}
        return run_config(tmp_path / "cache", [corpus])

    return config


def refusal(config: RunConfig) -> str:
    with pytest.raises(UserError) as caught:
        prepare(config, progress=False)
    return str(caught.value)


def documents(config: RunConfig) -> list[str]:
    prepared = prepare(config, progress=False)
    tokenizer = open_tokenizer(config, prepared)
    data = TokenSequences(prepared.sources[0].prefixes)
    ids = [data.get(number).tolist() for number in range(len(data.sequence_lengths))]
    assert all(document[-1] == tokenizer.eod for document in ids)
    return [tokenizer.decode(document[:-1]) for document in ids]


def test_from_the_column_to_batches(configured, rows):
    config = configured(column="body")
    check_config(config)
    assert documents(config) == BODIES
    assert prepare(config, progress=False).sources[0].name == f"my_lab:Csv {rows}"
    data = open_data(config, prepare(config, progress=False))
    assert data.micro_batches(0, 0, 1)[0]["tokens"].shape == (1, 16)


def test_the_cache_knows_options_and_version(configured, lab, tmp_path):
    first = prepare(configured(column="body"), progress=False)
    before = cached(tmp_path / "cache")
    assert prepare(configured(column="body"), progress=False) == first
    assert cached(tmp_path / "cache") == before

    other = configured(column="title")
    assert documents(other) == TITLES
    assert prepare(other, progress=False).sources[0].digest != first.sources[0].digest
    assert documents(configured(column="body")) == BODIES

    upper = CSV.replace("suffixes =", "version = 2\n    suffixes =")
    lab(upper.replace("options.column]", "options.column].upper()"))
    assert documents(configured(column="body")) == [body.upper() for body in BODIES]


def test_a_kind_that_inherits_from_ours_has_caches_of_its_own(lab, tmp_path):
    (tmp_path / "text.txt").write_text("one\n")
    lab(
        "from attnres_train.data.corpora.text import Text\n"
        "class Upper(Text):\n"
        "    def passages(self, file):\n"
        "        for passage in super().passages(file):\n"
        "            yield passage._replace(text=passage.text.upper())\n"
    )
    corpora = [
        {"kind": kind, "path": str(tmp_path / "text.txt")} for kind in ("text", "my_lab:Upper")
    ]
    ours, own = corpus_readers(run_config(tmp_path, corpora).data)
    assert ours.fingerprint() != own.fingerprint()
    assert [passage.text for passage in own.read(own.files[0])] == ["ONE\n"]


def test_options_are_checked(run_file, lab, rows):
    lab(CSV)
    corpus = f"data.corpus=[{{kind: 'my_lab:Csv', path: {rows}"
    message = error_of(run_file, corpus + ", options: {colum: body}}]")
    meant = "unknown key; did you mean data.corpus.0.options.column?"
    assert f"data.corpus.0.options.colum (command line): {meant}" in message
    assert "data.corpus.0.options.column: missing" in message
    message = error_of(run_file, corpus + ", options: {column: 3}}]")
    assert "data.corpus.0.options.column (command line): expected text, not 3" in message
    config = load_config(run_file, [corpus + ", options: {column: body}}]"])
    check_config(config)
    assert config.data.corpus[0].options.column == "body"


def test_its_files_are_checked_like_ours(configured, rows):
    def problems(path: str | None) -> str:
        config = configured(column="body")
        config.data.corpus[0].path = path
        with pytest.raises(ConfigError) as caught:
            check_config(config)
        return str(caught.value)

    assert problems(None) == "data.corpus.0.path is missing: a corpus of kind my_lab:Csv needs one"
    told = f"data.corpus.0.path: there is no file {rows}/rowz.csv; {rows} holds rows.csv"
    assert problems(f"{rows}/rowz.csv").startswith(told)
    os.remove(rows / "rows.csv")
    told = f"data.corpus.0.path: there is no *.csv in the folder {rows}"
    assert refusal(configured(column="body")) == told


def test_errors_name_file_kind_and_line(configured, rows, tmp_path):
    line = CSV.splitlines().index("                yield Passage(row[self.options.column])") + 1
    assert refusal(configured(column="text")) == (
        f"data.corpus.0.kind my_lab:Csv failed at reading {rows}/rows.csv: KeyError: 'text' "
        f"({tmp_path}/outside/my_lab.py, line {line})"
    )
    # The error is raised in the csv module; what its author wants to see is their own line.
    (rows / "rows.csv").write_bytes(b"body\n\xff\n")
    message = refusal(configured(column="body"))
    assert "rows.csv: UnicodeDecodeError" in message
    assert f"my_lab.py, line {line - 1})" in message


@pytest.mark.parametrize(
    ("passages", "message"),
    [
        ("yield 'text'", "passages() must yield Passage(text, ...), not 'text'"),
        ("yield Passage(None)", "passages() must yield Passage(text, ...), not Passage(text=None"),
        ("yield Passage('text', False)", "must end the document with the last passage of a file"),
        ("return None", "failed at reading {}: TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_what_passages_may_yield(configured, lab, rows, passages, message):
    lab(CSV.split("        with open")[0] + f"        {passages}\n")
    told = refusal(configured(column="body"))
    assert told.startswith("data.corpus.0.kind my_lab:Csv") and f"{rows}/rows.csv" in told
    assert message.format(rows / "rows.csv") in told


def test_without_passages(configured, lab):
    lab(CSV.split("    def passages")[0])
    told = "data.corpus.0.kind my_lab:Csv has no method passages(file)"
    assert refusal(configured(column="body")) == told


@pytest.mark.parametrize(
    ("found", "error"), [("self.options.folder", "AttributeError"), ("'no', 'no'", "FileNotFound")]
)
def test_an_error_in_the_search_for_files(configured, lab, found, error):
    lab(CSV + f"\n    def find_files(self):\n        return [{found}]\n")
    told = f"data.corpus.0.kind my_lab:Csv failed at looking for its files: {error}"
    assert refusal(configured(column="body")).startswith(told)


def test_a_kind_that_holds_tokens(lab, tmp_path):
    """It reads no path, but an option; and it needs no tokenizer."""
    lab(
        "from pathlib import Path\n"
        "from attnres_train.config.section import Section\n"
        "from attnres_train.data.corpora.reader import CorpusReader\n"
        "class Listed(CorpusReader):\n"
        "    holds_tokens = True\n"
        "    reads = frozenset()\n"
        "    class Options(Section):\n"
        "        file: Path\n"
        "    def find_files(self):\n"
        "        for prefix in self.options.file.read_text().split():\n"
        "            yield from (prefix + '.bin', prefix + '.idx')\n"
    )
    prefixes = [write_indexed(tmp_path / name, [[1, 2, 3, 7]] * 20) for name in "ab"]
    (tmp_path / "list").write_text("\n".join(prefixes))
    corpus = {"kind": "my_lab:Listed", "options": {"file": str(tmp_path / "list")}}
    config = run_config(tmp_path / "cache", [corpus], {"kind": "none"})
    check_config(config)
    prepared = prepare(config, progress=False)
    assert prepared.sources[0].prefixes == prefixes
    assert len(open_data(config, prepared).micro_batches(0, 0, 1)) == 4

    config.data.corpus[0].path = "x"
    with pytest.raises(ConfigError, match=r"data\.corpus\.0\.path is not read with kind my_lab:L"):
        check_config(config)
