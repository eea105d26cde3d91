from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnres_train.config import load_config
from tests.config.helpers import error_of, write


class TestExtends:
    def test_mappings_merge_and_lists_are_replaced(self, tmp_path, small_file):
        base = write(
            tmp_path,
            "base.yaml",
            "extends: small.yaml\n"
            "model: {residual: {kind: full}}\n"
            "parallel: {layout: [1, 1, 1, 1]}\n",
        )
        child = write(
            tmp_path,
            "deep/child.yaml",
            f"extends: ../{base.name}\nmodel: {{num_layers: 6}}\nparallel: {{layout: [3, 3]}}\n",
        )
        config = load_config(child)
        assert config.model.residual.kind == "full"
        assert (config.model.num_layers, config.model.hidden_size) == (6, 64)
        assert config.parallel.layout == [3, 3]

    def test_later_files_of_a_list_win_and_the_file_itself_wins_over_all(
        self, tmp_path, small_file
    ):
        write(tmp_path, "a.yaml", "run: {name: a, dir: a, seed: 1}\n")
        write(tmp_path, "b.yaml", "run: {name: b, dir: b}\n")
        child = write(tmp_path, "c.yaml", "extends: [small.yaml, a.yaml, b.yaml]\nrun: {name: c}\n")
        run = load_config(child).run
        assert (run.name, run.dir, run.seed) == ("c", "b", 1)

    def test_two_files_may_share_a_base(self, tmp_path, small_file):
        write(tmp_path, "a.yaml", "extends: small.yaml\n")
        write(tmp_path, "b.yaml", "extends: small.yaml\n")
        load_config(write(tmp_path, "c.yaml", "extends: [a.yaml, b.yaml]\n"))

    def test_circle(self, tmp_path):
        write(tmp_path, "a.yaml", "extends: b.yaml\n")
        write(tmp_path, "b.yaml", "extends: a.yaml\n")
        message = error_of(tmp_path / "a.yaml")
        assert f"{tmp_path / 'b.yaml'}:1" in message
        assert "a.yaml -> " in message
        assert message.endswith("a.yaml")

    def test_missing_base_names_the_line_and_what_is_near(self, tmp_path, small_file):
        child = write(tmp_path, "child.yaml", "run: {name: x}\nextends: smal.yaml\n")
        message = error_of(child)
        assert message.startswith(f"extends ({child}:2): there is no file {tmp_path / 'smal.yaml'}")
        assert f"near by: {small_file}" in message

    @pytest.mark.parametrize("value", ["3", "[a.yaml, 3]", "{a: b}", ""])
    def test_not_a_file_name(self, tmp_path, value):
        child = write(tmp_path, "child.yaml", f"extends: {value}\n")
        assert f"extends ({child}:1): expected a file or a list of files" in error_of(child)


class TestOverrides:
    def test_values_are_yaml(self, small_file):
        config = load_config(
            small_file,
            [
                "train.train_iters=20",
                "optimizer.lr=1e-3",
                "train.stop_after=null",
                "model.residual.kind=full",
                "log.plot=false",
                "data.corpus=[{kind: text, path: a.txt}, {kind: jsonl, path: [b, c], weight: 2}]",
                "run.name=a=b",
            ],
        )
        assert config.train.train_iters == 20
        assert config.optimizer.lr == 1e-3
        assert config.train.stop_after is None
        assert config.model.residual.kind == "full"
        assert config.log.plot is False
        assert [c.path for c in config.data.corpus] == ["a.txt", ["b", "c"]]
        assert config.run.name == "a=b"

    def test_the_last_one_wins(self, small_file):
        config = load_config(small_file, ["run.seed=1", "run.seed=2"])
        assert config.run.seed == 2

    def test_one_element_of_a_list(self, small_file):
        corpora = "data.corpus=[{kind: text, path: a}, {kind: text, path: b}]"
        config = load_config(small_file, [corpora, "data.corpus.1.weight=3"])
        assert [(c.path, c.weight) for c in config.data.corpus] == [("a", 1), ("b", 3)]

    def test_an_element_that_is_not_there(self, small_file):
        corpora = "data.corpus=[{kind: text, path: a}]"
        message = error_of(small_file, corpora, "data.corpus.1.weight=3")
        assert message.startswith("data.corpus.1.kind: missing from command line")
        message = error_of(small_file, corpora, "data.corpus.2={kind: text, path: b}")
        assert message == (
            "data.corpus.2 (command line): data.corpus has 1 element, counted from 0; the next one "
            "is data.corpus.1"
        )

    def test_the_next_element_of_a_list_is_put_at_its_end(self, small_file):
        more = "data.corpus.{}={{kind: text, path: {}}}"
        config = load_config(small_file, [more.format(0, "a"), more.format(1, "b")])
        assert [corpus.path for corpus in config.data.corpus] == ["a", "b"]

    def test_an_element_of_what_is_no_list_blames_the_override(self, tmp_path, small_file):
        file = write(tmp_path, "named.yaml", f"extends: {small_file}\nrun: {{name: mine}}\n")
        message = error_of(file, "run.name.0=x")
        assert message == 'run.name (command line): expected non-empty text, not {"0": "x"}'

    @pytest.mark.parametrize("element", ["-1", "last"])
    def test_no_element_of_a_list_blames_the_override(self, tmp_path, small_file, element):
        corpora = "data: {corpus: [{kind: text, path: a}]}"
        file = write(tmp_path, "corpora.yaml", f"extends: {small_file}\n{corpora}\n")
        message = error_of(file, f"data.corpus.{element}.path=x")
        assert message == (
            "data.corpus (command line): expected a non-empty list of sections, not "
            f'{{"{element}": {{"path": "x"}}}}'
        )

    @pytest.mark.parametrize("text", ["train.train_iters", "=3", "train..seq_length=3", ""])
    def test_form(self, small_file, text):
        assert f"override {text!r}: write it as key.path=value" in error_of(small_file, text)

    def test_bad_yaml(self, small_file):
        message = error_of(small_file, "parallel.layout=[1, 2")
        assert message.startswith("command line, 'parallel.layout=[1, 2': not valid YAML")

    @given(
        st.integers(0, 10**12)
        | st.floats(1e-300, 1e300)
        | st.text(
            st.characters(blacklist_categories=["Cc", "Cs", "Zl", "Zp"], max_codepoint=0xD7FF)
        )
    )
    def test_any_json_value_keeps_its_meaning(self, tmp_path_factory, value):
        path = tmp_path_factory.getbasetemp() / "any.yaml"
        path.write_text(
            "{model: {hidden_size: 1, num_layers: 1, vocab_size: 2},"
            " train: {train_iters: 1, seq_length: 1, global_batch_size: 1}}"
        )
        written = json.dumps(value, ensure_ascii=False)
        key = {int: "run.seed", float: "optimizer.lr", str: "log.wandb.project"}[type(value)]
        config = load_config(path, [f"{key}={written}"])
        assert functools.reduce(getattr, key.split("."), config) == value


class TestFiles:
    def test_missing_file_lists_configurations_near_by(self, tmp_path, small_file):
        other = write(tmp_path, "zebra.yml", "")
        message = error_of(tmp_path / "smal.yaml")
        assert message == (
            f"there is no file {tmp_path / 'smal.yaml'}; near by: {small_file}, {other}"
        )

    def test_configs_folder_is_near(self, tmp_path, monkeypatch):
        write(tmp_path, "configs/quick.yaml", "")
        monkeypatch.chdir(tmp_path)
        assert error_of(Path("quick")) == "there is no file quick; near by: configs/quick.yaml"

    def test_else_those_that_come_with_the_package_are(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        message = error_of(Path("configs/quick.yaml"))
        assert message.startswith(
            "there is no file configs/quick.yaml; with the package come: quickstart, "
        )

    def test_folder(self, tmp_path):
        assert error_of(tmp_path).startswith(f"cannot read {tmp_path}")

    def test_not_text(self, tmp_path):
        path = tmp_path / "x.yaml"
        path.write_bytes(b"\xff\xfe\x00")
        assert "is not a text file" in error_of(path)


def test_a_link_that_leads_to_itself(tmp_path):
    (tmp_path / "loop.yaml").symlink_to(tmp_path / "loop.yaml")
    assert "loop.yaml: Too many levels of symbolic links" in error_of(tmp_path / "loop.yaml")
