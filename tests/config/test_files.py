from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.helpers import says


class TestData:
    def test_missing_files_name_what_is_there(self, problems, tmp_path):
        (tmp_path / "text.txt").touch()
        paths = [tmp_path / "txt.txt", tmp_path / "*.jsonl", tmp_path / "text.txt"]
        corpora = ", ".join(f"'{path}'" for path in paths)
        found = problems(f"data.corpus=[{{kind: text, path: [{corpora}]}}]")
        assert len(found) == 2
        assert found[0].startswith(f"data.corpus.0.path: there is no file {tmp_path}/txt.txt; ")
        assert f"{tmp_path} holds text.txt" in found[0]
        assert f"{tmp_path}/*.jsonl" in found[1]

    def test_globs_and_folders(self, problems, tmp_path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "a.jsonl").touch()
        (tmp_path / "brackets[1].jsonl").touch()
        for path in ("full", "full/*.jsonl", "**/*.jsonl", "brackets[1].jsonl"):
            assert problems(f"data.corpus=[{{kind: jsonl, path: '{tmp_path}/{path}'}}]") == []
        found = problems(f"data.corpus=[{{kind: jsonl, path: '{tmp_path}/empty'}}]")
        says(found, "data.corpus.0.path: the folder", "empty holds no file")

    def test_indexed_needs_both_files(self, problems, tmp_path):
        corpus = f"data.corpus=[{{kind: indexed, path: '{tmp_path}/shard'}}]"
        says(problems(corpus), f"no {tmp_path}/shard.bin and no {tmp_path}/shard.idx")
        (tmp_path / "shard.bin").touch()
        says(problems(corpus), f"there is no {tmp_path}/shard.idx", "holds shard.bin")
        (tmp_path / "shard.idx").touch()
        assert problems(corpus, "data.tokenizer.kind=none") == []
        says(problems(corpus.replace("shard'", "shard.bin'")), f"its prefix, {tmp_path}/shard")

    def test_missing_tokenizer_file(self, problems, tmp_path):
        found = problems("data.tokenizer.kind=file", f"data.tokenizer.path={tmp_path}/t.json")
        says(found, f"data.tokenizer.path: there is no file {tmp_path}/t.json")
        found = problems("data.tokenizer.kind=file", "data.tokenizer.path=/")
        says(found, "data.tokenizer.path: the folder / has no tokenizer.json; / holds ")


class TestResume:
    @pytest.fixture
    def run_folder(self, tmp_path) -> Path:
        folder = tmp_path / "runs" / "mine"
        (folder / "checkpoints" / "step_00000100").mkdir(parents=True)
        (folder / "checkpoints" / "step_00000100" / "meta.json").touch()
        return folder

    @pytest.mark.parametrize("path", [".", "checkpoints", "checkpoints/step_00000100"])
    def test_run_folder_checkpoint_folder_and_checkpoint(self, problems, run_folder, path):
        assert problems(f"checkpoint.resume={run_folder / path}") == []

    @pytest.mark.parametrize("word", ["auto", "never"])
    def test_words(self, problems, word):
        assert problems(f"checkpoint.resume={word}") == []

    @pytest.mark.parametrize(
        ("path", "parts"),
        [
            ("checkpoints/step_00000200", ("there is no folder", "holds step_00000100")),
            ("../mina/checkpoints", ("there is no folder", "holds mine")),
            ("..", ("there is no checkpoint (step_*)", "holds mine")),
        ],
    )
    def test_no_checkpoint_there(self, problems, run_folder, path, parts):
        says(problems(f"checkpoint.resume={run_folder / path}"), "checkpoint.resume", *parts)
