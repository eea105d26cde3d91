from __future__ import annotations

import pytest

from attnres_train.config import load_config
from tests.config.helpers import error_of, write


class TestPlainScalars:
    """YAML 1.1's surprises, which PyYAML has and we do not."""

    @pytest.mark.parametrize(
        ("text", "value"),
        [("1e-3", 1e-3), ("2E2", 200), ("1_000.5", 1000.5), ("5", 5), (".5", 0.5)],
    )
    def test_numbers(self, small_file, text, value):
        assert load_config(small_file, [f"optimizer.lr={text}"]).optimizer.lr == value

    @pytest.mark.parametrize("text", ["on", "off"])
    def test_on_and_off_are_words(self, small_file, text):
        assert load_config(small_file, [f"log.progress={text}"]).log.progress == text

    @pytest.mark.parametrize("text", ["0123", "2026-01-31", "1:30", "yes", "1e5x", "00.5"])
    def test_names_that_only_look_like_something_else(self, small_file, text):
        assert load_config(small_file, [f"run.name={text}"]).run.name == text

    def test_whole_floats_are_integers(self, small_file):
        assert load_config(small_file, ["train.train_iters=1e3"]).train.train_iters == 1000

    @pytest.mark.parametrize("text", [".inf", "-.inf", ".nan"])
    def test_no_learning_rate_without_bounds(self, small_file, text):
        assert "optimizer.lr (command line): expected a number above 0" in error_of(
            small_file, f"optimizer.lr={text}"
        )


class TestErrors:
    @pytest.mark.parametrize(
        ("text", "line", "problem"),
        [
            ("a:\n  - b\n c: d\n", 3, "not valid YAML"),
            ("train:\n\tseq_length: 3\n", 2, "not valid YAML: found character '\\t'"),
            ("a: [1\nb: 2\n", 2, "not valid YAML"),
            ("a: 1\n---\nb: 2\n", 2, "not valid YAML"),
            ("a: !!python/object:os.system x\n", 1, "not valid YAML"),
            ("a: \x01\n", 1, "not valid YAML"),
            ("a: &a [*a]\n", 1, "an anchor that contains itself"),
            ("ok: 1\n2: 3\n", 2, "a key must be a word, not 2"),
        ],
    )
    def test_syntax(self, tmp_path, text, line, problem):
        path = write(tmp_path, "x.yaml", text)
        assert error_of(path).startswith(f"{path}:{line}: {problem}")

    def test_repeated_key(self, tmp_path):
        path = write(tmp_path, "x.yaml", "train:\n  seq_length: 3\n  seq_length: 4\n")
        assert error_of(path) == (f"train.seq_length ({path}:3): written twice, first at {path}:2")

    @pytest.mark.parametrize("text", ["- a\n", "word\n", "3\n"])
    def test_not_a_mapping(self, tmp_path, text):
        path = write(tmp_path, "x.yaml", text)
        assert "expected a mapping of sections" in error_of(path)

    def test_empty_file_lacks_its_sections(self, tmp_path):
        path = write(tmp_path, "x.yaml", "# nothing yet\n")
        assert f"model: missing from {path}" in error_of(path)


@pytest.mark.parametrize(
    ("value", "quoted"),
    [
        ("*.jsonl", "*.jsonl"),
        ("[*.jsonl, b]", "*.jsonl"),
        ("@host/x", "@host/x"),
        ("[{kind: text, path: ${SCRATCH}/x}]", "${SCRATCH}/x"),
    ],
)
def test_a_value_that_has_to_be_in_quotes_is_told(tmp_path, small_file, value, quoted):
    hint = f'a value like this has to be in quotes: "{quoted}"'
    assert error_of(small_file, f"data.corpus={value}").endswith(hint)
    file = write(tmp_path, "mine.yaml", f"extends: {small_file}\ndata:\n  corpus: {value}\n")
    assert f"{file}:3: not valid YAML" in error_of(file)
    assert error_of(file).endswith(hint)


def test_merge_keys_are_told_what_to_use(tmp_path, small_file):
    text = f"extends: {small_file}\nx: &x {{name: a}}\nrun:\n  <<: *x\n"
    file = write(tmp_path, "merged.yaml", text)
    told = error_of(file)
    assert f"run.<< ({file}:4): merge keys are not read" in told
    assert "`extends`" in told
