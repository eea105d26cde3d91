"""What is prepared is handed to those who read it, not looked up by name."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from attnres_train.data.held_out import Cut
from attnres_train.data.loader import open_data
from attnres_train.data.prepare import check_alike, open_tokenizer, prepare
from attnres_train.data.samples import Source
from attnres_train.errors import UserError
from tests.data.tiny import run_config, text_corpus, write_jsonl, write_text


def test_two_projects_with_one_cache(tmp_path, monkeypatch):
    """The same configuration, relative paths and all: each reads its own text."""
    found = {}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        write_jsonl(Path("rows.jsonl"), [f"{name} text of project {name} " * 9] * 12)
        config = run_config("../cache", [{"kind": "jsonl", "path": "rows.jsonl"}])
        found[name] = (config, prepare(config, progress=False))
    assert found["a"][0] == found["b"][0]
    monkeypatch.chdir(tmp_path / "a")  # a's workers start when b has prepared
    config, prepared = found["a"]
    tokenizer = open_tokenizer(config, prepared)
    for batch in open_data(config, prepared).micro_batches(0, 0, 1):
        text = tokenizer.decode(batch["tokens"].flatten().tolist())
        assert "project a" in text and "project b" not in text
    assert found["b"][1].sources[0].digest != prepared.sources[0].digest


def test_machines_must_have_the_same_data(tmp_path):
    """Each with a cache of its own; how closely each has looked does not matter."""
    texts = write_text(tmp_path / "texts", 12)
    one, two = (run_config(tmp_path / name, [text_corpus(texts)]) for name in ("one", "two"))
    two.data.verify = "full"
    machines = {"node0": prepare(one, progress=False), "node1": prepare(two, progress=False)}
    check_alike(machines)
    (texts / "003.txt").write_text("only here")
    machines["node2"] = prepare(one, progress=False)
    with pytest.raises(UserError) as caught:
        check_alike(machines)
    assert str(caught.value) == (
        "machine node2 has other data than machine node0: data.corpus.0 differs in files or "
        "tokenizer. Give all machines the same files"
    )
    other_end = replace(machines["node1"], eod=7)
    with pytest.raises(UserError, match=r"node1 has other data .* the end of a document differs"):
        check_alike({"node0": machines["node0"], "node1": other_end})


def test_a_source_by_way_of_json():
    later = Source("k", "n, new files", "e", 1.0, ["q"], start=7, files="g", num_files=2)
    source = Source("k", "n", "d", 1.0, ["p"], "c", True, True, Cut(3, 9), later=(later,))
    assert Source.of(json.loads(json.dumps(asdict(source)))) == source
    assert [one.prefixes for one in source.generations] == [["p"], ["q"]]
