"""Thirty datasets that are damaged, or not what they are named: each is told by file and place
before anything is trained, whatever reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnres_train.data.prepare import prepare
from attnres_train.errors import UserError
from tests.data.corruptions import CASES, JSONL, SEQUENCES, TEXT, write_parquet
from tests.data.tiny import run_config, write_indexed


@pytest.mark.parametrize("name", CASES)
def test_a_corruption_is_told_by_file_and_place(tmp_path: Path, name: str) -> None:
    kind, file_name, corrupt, told = CASES[name]
    folder = tmp_path / "corpus"
    folder.mkdir()
    file = folder / file_name.replace(".bin", ".idx")
    if kind == "indexed":
        path = write_indexed(file.with_suffix(""), SEQUENCES)
    else:
        path = str(folder)
        file.write_bytes(TEXT if kind == "text" else JSONL)
    tokenizer = {"kind": "none"} if kind == "indexed" else {"vocab_size": 300}
    config = run_config(tmp_path / "cache", [{"kind": kind, "path": path}], tokenizer)
    corrupt(file)
    with pytest.raises(UserError) as caught:
        prepare(config, progress=False)
    for part in (*told, str(folder) if "empty" in told else str(folder / file_name)):
        assert part in str(caught.value)
    assert not list((tmp_path / "cache").glob("indices/*/summary.json")), "nothing to train on"


def test_there_are_thirty_of_them_and_all_kinds() -> None:
    assert len(CASES) >= 30
    assert {kind for kind, *_ in CASES.values()} == {"text", "jsonl", "parquet", "indexed"}


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "indexed"])
def test_without_a_corruption_they_are_read(tmp_path: Path, kind: str) -> None:
    file = tmp_path / {"text": "a.txt", "indexed": "a.idx"}.get(kind, f"a.{kind}")
    if kind == "parquet":
        write_parquet(file)
    elif kind != "indexed":
        file.write_bytes(TEXT if kind == "text" else JSONL)
    path = str(file) if kind != "indexed" else write_indexed(tmp_path / "a", SEQUENCES)
    tokenizer = {"kind": "none"} if kind == "indexed" else {"vocab_size": 300}
    corpus = {"kind": kind, "path": path}
    config = run_config(tmp_path / "cache", [corpus], tokenizer, data__split=(1.0, 0.0))
    assert prepare(config, progress=False).num_tokens > 100
