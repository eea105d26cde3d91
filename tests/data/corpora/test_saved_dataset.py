"""Folders of Arrow files: as pyarrow writes them, and as `datasets` does where it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnres_train.data.corpora.reader import find_corpora
from attnres_train.errors import UserError
from tests.data.tiny import run_config

pyarrow = pytest.importorskip("pyarrow")
ROWS = ["one", "", None, "Füße 漢字", "five " * 30]


def write(file: Path, rows: list, field: str = "text", at_once: int = 2) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({field: rows, "other": list(range(len(rows)))})
    with pyarrow.ipc.new_stream(str(file), table.schema) as stream:
        stream.write_table(table, max_chunksize=at_once)
    return file


def texts(path: Path, **more) -> list[str]:
    corpus = {"kind": "datasets", "path": str(path), **more}
    (reader,) = find_corpora(run_config(path, [corpus]).data)
    return [passage.text for file in reader.files for passage in reader.read(file)]


def test_a_row_is_a_document(tmp_path):
    write(tmp_path / "saved" / "data-00000-of-00002.arrow", ROWS)
    write(tmp_path / "saved" / "data-00001-of-00002.arrow", ["last"])
    write(tmp_path / "saved" / "cache-1234.arrow", ["of a filter"])
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    expected = ["one", "", "", "Füße 漢字", "five " * 30, "last"]
    assert texts(tmp_path / "saved") == expected
    assert texts(write(tmp_path / "b.arrow", ["x"], field="body"), text_field="body") == ["x"]


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        texts(path)
    return str(caught.value)


def test_what_cannot_be_read_is_told(tmp_path):
    file = write(tmp_path / "a.arrow", ["long " * 500] * 8)
    assert 'there is no column "text" but body, other' in refusal(
        write(tmp_path / "b.arrow", ["x"], field="body")
    )
    assert "row 1" in refusal(write(tmp_path / "c.arrow", [1, 2]))
    file.write_bytes(file.read_bytes()[:-6000])
    assert "a.arrow is damaged after row 4" in refusal(file)
    (tmp_path / "d.arrow").write_text("{}" * 40)
    assert "is no Arrow file of a dataset" in refusal(tmp_path / "d.arrow")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert "holds the splits train, test: name the folder of one" in refusal(tmp_path)


def test_as_the_package_writes_them(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [f"text {number}" for number in range(20)]
    saved = datasets.Dataset.from_dict({"text": rows}).shuffle(seed=0).select(range(10))
    saved.save_to_disk(str(tmp_path / "one"), num_shards=2)
    assert texts(tmp_path / "one") == saved["text"][:]
    both = datasets.DatasetDict({"train": saved, "test": saved})
    both.save_to_disk(str(tmp_path / "both"))
    assert texts(tmp_path / "both" / "test") == saved["text"][:]
    assert "holds the splits train, test" in refusal(tmp_path / "both")
