"""The corpus from packages: tiny ones, made here; no network."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from attnres_train.__main__ import main
from attnres_train.config.schema import RunConfig
from attnres_train.corpus.build import build
from attnres_train.corpus.duplicates import Seen
from attnres_train.corpus.packages import FetchError, fetch
from attnres_train.corpus.sources import SOURCES, plain, standard_library
from attnres_train.data.corpora.reader import find_corpora
from attnres_train.errors import UserError
from attnres_train.supervise.run_lock import run_lock
from tests.corpus import packages

MAKERS = {
    "ansible": packages.ansible,
    "botocore": packages.botocore,
    "google-api-python-client": packages.google,
    "dict-gcide": packages.gcide,
    "linux-source": packages.linux,
}


class Registry:
    """Hands out the tiny packages, but for those that are ``gone``."""

    def __init__(self, *gone: str) -> None:
        self.gone, self.asked = gone, []

    def __call__(self, client: str, package: str, folder: Path) -> Path:
        self.asked.append(package)
        if package in self.gone or "all" in self.gone:
            raise FetchError("no network")
        folder.mkdir(exist_ok=True)
        return MAKERS[package](folder / f"{package}.{'whl' if client == 'pip' else 'deb'}")


def documents(folder: Path, source: str) -> dict[str, str]:
    shards = [shard.read_text() for shard in sorted(folder.glob(f"{source}/*.jsonl"))]
    lines = [json.loads(line) for text in shards for line in text.splitlines()]
    return {line["name"]: line["text"] for line in lines}


def test_what_is_taken_of_each_package(tmp_path):
    told: list[str] = []
    manifest = build(tmp_path / "c", told.append, get=Registry())
    folder = tmp_path / "c"
    (text,) = documents(folder, "ansible").values()
    assert (
        text.startswith("module: copy\n") and text.endswith("- copy: x") and "def main" not in text
    )
    service = documents(folder, "botocore")
    assert len(service) == 2 and any(text.endswith("\na & b") for text in service.values())
    assert list(documents(folder, "googleapis")) == [
        "googleapiclient/discovery_cache/documents/drive.v3.json#resources.files"
    ]
    letters = documents(folder, "gcide")
    assert list(letters) == ["ab", "ba"] and letters["ab"].count("Aback") == 1
    assert list(documents(folder, "linux-docs")) == ["Documentation/a/b.rst"]
    assert list(documents(folder, "linux-code")) == ["kernel/fork.c"]
    assert set(manifest["sources"]) == {source.name for source in SOURCES}
    assert manifest["sources"]["linux-code"]["is_code"] and not manifest["missing"]
    assert len(told) == len(SOURCES)


def test_the_manifest_says_whence_and_under_which_licence(tmp_path):
    manifest = build(tmp_path, lambda line: None, get=Registry())
    assert manifest == json.loads((tmp_path / "manifest.json").read_text())
    one = manifest["sources"]["ansible"]
    assert one["licences"] == ["Apache-2.0"]
    assert manifest["sources"]["gcide"]["licences"] == ["GPL-2"]
    archive = tmp_path / ".packages" / one["archive"]
    assert one["archive_sha256"] == hashlib.sha256(archive.read_bytes()).hexdigest()
    (shard,) = one["shards"]
    assert shard["sha256"] == hashlib.sha256((tmp_path / shard["file"]).read_bytes()).hexdigest()
    assert manifest["characters"] == sum(one["characters"] for one in manifest["sources"].values())


def test_data_reads_it(tmp_path):
    build(tmp_path, lambda line: None, get=Registry())
    model = {"hidden_size": 8, "num_layers": 1, "vocab_size": 300}
    train = {"train_iters": 1, "seq_length": 8, "global_batch_size": 1}
    corpus = [{"kind": "jsonl", "path": str(tmp_path / name)} for name in ("ansible", "gcide")]
    config = RunConfig.model_validate({"model": model, "train": train, "data": {"corpus": corpus}})
    found = find_corpora(config.data)
    # Hidden files of ours are none of the corpus's.
    assert [[file.name for file in one.files] for one in found] == [["00000.jsonl"]] * 2


def test_it_goes_on_where_it_was(tmp_path):
    first = Registry("dict-gcide")
    manifest = build(tmp_path, lambda line: None, get=first)
    assert list(manifest["missing"]) == ["gcide"]
    (tmp_path / ".gcide.partial").mkdir()  # as if it had been ended there
    (tmp_path / ".gcide.partial" / "00000.jsonl").write_text("half")
    again = Registry()
    whole = build(tmp_path, lambda line: None, get=again)
    assert again.asked == ["dict-gcide"] and not whole["missing"]
    other = build(tmp_path / "other", lambda line: None, get=Registry())
    assert whole["sources"] == other["sources"]


def test_what_is_there_twice_is_left_out_across_sources(tmp_path):
    twice = [SOURCES[0], SOURCES[1]]
    manifest = build(tmp_path, lambda line: None, sources=twice, get=Registry())
    assert manifest["sources"]["ansible"]["documents"]["kept"] == 1

    class Same(Registry):
        def __call__(self, client: str, package: str, folder: Path) -> Path:
            folder.mkdir(exist_ok=True)
            return packages.ansible(folder / f"{package}.whl")

    same = [SOURCES[0], SOURCES[0].__class__("copy", "pip", "copy", SOURCES[0].documents)]
    manifest = build(tmp_path / "b", lambda line: None, sources=same, get=Same())
    assert manifest["sources"]["copy"]["documents"] == {
        "kept": 0,
        "equal": 1,
        "near": 0,
        "short": 0,
    }


def test_near_duplicates_by_paragraphs():
    paragraphs = [f"Paragraph {n} says something of its own, at some length." for n in range(10)]
    seen = Seen()
    assert seen.judge("\n\n".join(paragraphs)) == "kept"
    assert seen.judge("\n\n".join(paragraphs)) == "equal"
    assert seen.judge("\n \n".join(p.replace(" ", "\n  ") for p in paragraphs)) == "near"
    assert seen.judge("\n\n".join([*paragraphs[:8], "x" * 90])) == "near"
    assert seen.judge("\n\n".join([*paragraphs[:5], *(p[::-1] for p in paragraphs[:5])])) == "kept"
    assert seen.judge("short\n\nlines") == seen.judge("other\n\nlines") == "kept"


def test_without_any_package_the_standard_library(tmp_path):
    told: list[str] = []
    some = [("os.py", packages.LONG * 5)]
    manifest = build(tmp_path, told.append, get=Registry("all"), instead=lambda: iter(some))
    assert list(manifest["sources"]) == ["python-stdlib"]
    assert len(manifest["missing"]) == len(SOURCES)
    assert any("standard library alone" in line for line in told)
    assert list(build(tmp_path, told.append, get=Registry())["sources"]) == sorted(
        source.name for source in SOURCES
    )


def test_two_builds_at_once(tmp_path):
    with run_lock(tmp_path, "corpus", "DIR"), pytest.raises(UserError, match=r"DIR: .* in use by"):
        build(tmp_path, lambda line: None, get=Registry())


def test_a_client_that_fails_is_told(tmp_path):
    with pytest.raises(FetchError, match="apt-cache"):
        fetch("apt", "no-such-package-of-ours", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["apt-no-such-package-of-ours.partial"]


def test_this_python_has_a_library():
    name, text = next(iter(standard_library()))
    assert name.endswith(".py") and text


def test_html():
    assert plain("<p>One &lt;b&gt;</p> <p>two\n  <code>x</code></p>") == "One <b>\ntwo x"


def test_a_source_that_is_none(tmp_path, capsys):
    assert main(["corpus", str(tmp_path), "--only", "wikipedia"]) == 2
    assert "there are ansible, botocore" in capsys.readouterr().err
