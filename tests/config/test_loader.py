from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnres_train.config import ConfigError, json_schema, load_config, save_config
from attnres_train.config.loader import as_yaml, load_with_places
from attnres_train.errors import UserError
from tests.config.helpers import error_of, write


class TestMessages:
    def test_unknown_key_names_place_and_nearest_in_another_section(self, tmp_path, small_file):
        child = write(tmp_path, "child.yaml", "extends: small.yaml\nmodel:\n  block_size: 3\n")
        assert error_of(child) == (
            f"model.block_size ({child}:3): unknown key; did you mean model.residual.block_size=3?"
        )

    def test_unknown_key_stands_in_the_base(self, tmp_path):
        base = write(tmp_path, "base.yaml", "train:\n  train_iter: 3\n")
        child = write(tmp_path, "child.yaml", "extends: base.yaml\n")
        assert f"train.train_iter ({base}:2): unknown key; did you mean train.train_iters" in (
            error_of(child)
        )

    @pytest.mark.parametrize(
        ("override", "meant"),
        [
            ("train.lr=1", "optimizer.lr=1?"),
            ("trian.train_iters=1", "train?"),
            ("model.hiden_size=1", "model.hidden_size=1?"),
            ("data.corpus.0.wieght=1", "data.corpus.0.weight=1?"),
            ("pipeline_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2?"),
        ],
    )
    def test_nearest(self, small_file, override, meant):
        message = error_of(small_file, "data.corpus=[{kind: python-stdlib}]", override)
        assert f"(command line): unknown key; did you mean {meant}" in message

    def test_unknown_key_like_nothing_else_lists_what_is_known(self, small_file):
        message = error_of(small_file, "log.zzz=1")
        assert "log.zzz (command line): unknown key; known here: interval, progress," in message

    @pytest.mark.parametrize("section", ["data.tokenizer.options", "data.corpus.0.options"])
    def test_options_of_a_kind_are_no_place_for_keys_of_the_schema(self, small_file, section):
        message = error_of(small_file, "data.corpus=[{kind: python-stdlib}]", f"{section}.lr=1")
        assert f"{section}.lr (command line): unknown key; known here: nothing" in message

    @pytest.mark.parametrize(
        ("override", "wanted"),
        [
            ("model.residual.block_size=0", "an integer of at least 1, not 0"),
            ("train.train_iters=ten", 'an integer of at least 1, not "ten"'),
            ("train.train_iters=2.5", "an integer of at least 1, not 2.5"),
            ("train.train_iters=true", "an integer of at least 1, not true"),
            ("train.stop_after=0", "an integer of at least 1 or null, not 0"),
            ("optimizer.momentum=1", "a number of at least 0 and below 1, not 1"),
            ("optimizer.betas=[0.9]", "a list of 2 numbers, not [0.9]"),
            ("log.plot=3", "true or false, not 3"),
            ("run.name=5", "non-empty text, not 5"),
            ("run.name=", "non-empty text, not null"),
            ("data.corpus=[]", "a non-empty list of sections, not []"),
            ("parallel.layout=[1, x]", "one of even, auto or a list of integers or text, not"),
            ("model.kda=null", "a section with the keys num_heads, head_dim"),
            ("train.device=tpu", 'one of auto, cpu, cuda, not "tpu"'),
        ],
    )
    def test_wrong_value_says_what_is_expected(self, small_file, override, wanted):
        key = override.partition("=")[0]
        assert error_of(small_file, override).startswith(f"{key} (command line): expected {wanted}")

    def test_inside_a_list(self, small_file):
        message = error_of(small_file, "data.corpus=[{kind: text}, {kind: novel}]")
        assert message.startswith(
            "data.corpus.1.kind (command line): expected one of python-stdlib"
        )

    def test_long_values_are_cut(self, small_file):
        assert len(error_of(small_file, f"train.train_iters={'x' * 1000}")) < 200

    def test_missing_keys_name_the_section_that_lacks_them(self, tmp_path):
        path = write(tmp_path, "x.yaml", "run: {name: x}\ntrain:\n  train_iters: 3\n")
        lines = error_of(path, "train.seq_length=8").splitlines()
        assert lines[0] == "2 problems:"
        assert lines[1].startswith(
            f"  model: missing from {path}; expected a section with the keys"
        )
        assert lines[2] == (
            f"  train.global_batch_size: missing from {path}:2; expected an integer of at least 1"
        )

    def test_every_problem_at_once(self, small_file):
        message = error_of(small_file, "train.seq_length=0", "run.nme=x", "optimizer.lr=-1")
        assert message.startswith("3 problems:\n  run.nme")
        assert issubclass(ConfigError, UserError)


class TestSave:
    @given(st.text(st.characters(blacklist_categories=["Cs"]), min_size=1))
    def test_round_trip_of_any_text(self, tmp_path_factory, text):
        folder = tmp_path_factory.getbasetemp()
        source = folder / "source.yaml"
        source.write_text(
            "{model: {hidden_size: 1, num_layers: 1, vocab_size: 2},"
            " train: {train_iters: 1, seq_length: 1, global_batch_size: 1}}"
        )
        config = load_config(source)
        config.log.wandb.project = text
        save_config(config, folder / "saved.yaml")
        assert load_config(folder / "saved.yaml") == config

    def test_round_trip_of_everything_else(self, tmp_path, small_file):
        config = load_config(
            small_file,
            [
                "optimizer={lr: 1e-5, betas: [0.8, 0.99], eps: 1e-12}",
                "parallel.layout=E(t|)*3,tL",
                "log={progress: off, wandb: {enabled: true}}",
                "data.corpus=[{kind: jsonl, path: [a, b], weight: 0.1}]",
                "model.full_attention_layers=[1, 3]",
            ],
        )
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml") == config

    def test_every_key_is_written(self, tmp_path, small):
        save_config(small, tmp_path / "saved.yaml")
        text = (tmp_path / "saved.yaml").read_text()
        for key in ("block_size", "routed_scaling_factor", "keep_last", "min_lr_ratio"):
            assert f"{key}:" in text


class TestPlaces:
    def test_the_last_to_write_a_value_is_named(self, tmp_path, small_file):
        child = write(tmp_path, "child.yaml", "extends: small.yaml\ntrain:\n  seq_length: 8\n")
        config, places = load_with_places(child, ["run.name=x"])
        text = as_yaml(config, places)
        found = {}
        for line in text.splitlines():
            key, _, place = line.partition("  # ")
            found[key.strip()] = place
        assert found["name: x"] == "command line"
        assert found["seq_length: 8"] == f"{child}:3"
        assert found["train_iters: 100"] == f"{small_file}:6"
        assert found["micro_batch_size: 1"] == ""
        (tmp_path / "again.yaml").write_text(text)
        assert load_config(tmp_path / "again.yaml") == config

    def test_elements_of_a_list_that_was_replaced_leave_no_trace(self, tmp_path, small_file):
        corpus = "data: {corpus: [{kind: text, path: small.yaml, text_field: body}]}\n"
        base = write(tmp_path, "base.yaml", "extends: small.yaml\n" + corpus)
        config, places = load_with_places(base, ["data.corpus=[{kind: text, weight: 3}]"])
        text = as_yaml(config, places)
        assert str(base) not in text
        assert text.count("# command line") == 2
        lines = [line for line in text.splitlines() if "text_field: text" in line]
        assert lines == ["    text_field: text"]

    @pytest.mark.parametrize("name", ["a: b # c", "- x", "two\nlines", "'", "  ", "x" * 300, "#"])
    def test_any_text_keeps_its_line(self, tmp_path, small_file, name):
        config, places = load_with_places(small_file, [f"log.wandb.project={json.dumps(name)}"])
        text = as_yaml(config, places)
        (line,) = [line for line in text.splitlines() if line.lstrip().startswith("project: ")]
        assert line.endswith("  # command line")
        (tmp_path / "again.yaml").write_text(text)
        assert load_config(tmp_path / "again.yaml").log.wandb.project == name


class TestJsonSchema:
    def test_sections_are_closed_and_described(self):
        schema = json_schema()
        assert schema["properties"].keys() >= {"extends", "model", "train"}
        for section in schema["$defs"].values():
            assert section["additionalProperties"] is False
            assert "required" not in section
            for name, field in section["properties"].items():
                assert field["description"], name

    def test_choices_and_bounds(self):
        residual = json_schema()["$defs"]["ResidualConfig"]["properties"]
        ours, own = residual["kind"]["anyOf"]
        assert ours["enum"][:3] == ["standard", "full", "block"]
        assert re.search(own["pattern"], "my_lab.residuals:LayerScale")
        assert residual["block_size"]["minimum"] == 1


def test_loading_needs_neither_torch_nor_megatron(small_file):
    code = (
        "import sys, attnres_train.config as c\n"
        "assert 'pydantic' not in sys.modules\n"
        f"config = c.load_config({str(small_file)!r})\n"
        "c.check_config(config, 1); c.describe(config, [4]); c.json_schema()\n"
        "print({'torch', 'megatron', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
