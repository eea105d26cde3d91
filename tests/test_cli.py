"""The command line: every kind of bad input ends with exit code 2 and a message that names it,
before a worker starts; the small commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

import attnres_train
from attnres_train.__main__ import main
from attnres_train.supervise.run_lock import run_lock
from tests.data.tiny import write_indexed
from tests.tiny import CONFIG, SAMPLES, TinyRuns, grid, run_cli, write_config


@pytest.fixture
def refuse(
    tiny: TinyRuns, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """Start training with arguments that must be refused; returns the message."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(
        "attnres_train.commands.train.launch", lambda *_: pytest.fail("workers were started")
    )

    def run(*arguments: str) -> str:
        runs = set((tiny.folder / "runs").glob("*"))
        assert main(["train", str(tiny.path), "run.name=refused", *arguments]) == 2
        assert set((tiny.folder / "runs").glob("*")) == runs
        output = capsys.readouterr()
        errors = output.err.splitlines()
        first = next(line for line in errors if not line.startswith("data: "))
        assert first.startswith("error: "), output.err
        assert "Traceback" not in output.err
        assert output.out == ""
        return output.err

    return run


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["train.train_iter=5"], ["train.train_iter ", "did you mean train.train_iters=5?"]),
        (["model.residual.blocksize=2"], ["did you mean model.residual.block_size=2?"]),
        (["trane.train_iters=5"], ["trane", "did you mean train"]),
        (["model.num_layers=four"], ["model.num_layers", "integer", '"four"']),
        (["log.tensorboard=7"], ["log.tensorboard", "true or false"]),
        (["train.global_batch_size=7"], ["train.global_batch_size 7", "divisible", "6 or 8"]),
        (["parallel.pipeline_model_parallel_size=5"], ["5 chunks", "model.num_layers is 4"]),
        (["model.residual.block_size=0"], ["model.residual.block_size", "at least 1"]),
        (["model.moe.num_experts=1"], ["model.moe.num_experts_per_token is 2", "experts"]),
        (["parallel.tensor_model_parallel_size=3"], ["model.kda.num_heads 2", "leaves 2 over"]),
        (["data.corpus.0.path=/no/where.txt"], ["data.corpus.0.path", "/no/where.txt"]),
        (["data.tokenizer.vocab_size=400"], ["400", "model.vocab_size is 300"]),
        (["checkpoint.resume=/no/where"], ["checkpoint.resume", "/no/where"]),
        (["train.train_iters"], ["train.train_iters", "="]),
        (
            ["train.train_iters=0", "model.hidden_size=-1"],
            ["2 problems", "train.train_iters", "model.hidden_size"],
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and "=" in value[0] else "",
)
def test_bad_values(refuse, overrides, told):
    message = refuse(*overrides)
    for text in told:
        assert text in message


def test_the_number_of_processes_must_fit(refuse):
    message = refuse("--nproc", "3", "parallel.pipeline_model_parallel_size=2")
    assert "--nproc) is 3" in message and "start 2 or 4 processes" in message
    assert "start 1 processes" in refuse("--nproc", "-2")
    message = refuse("--nproc", "3")
    assert f"train.global_batch_size {SAMPLES} is not divisible by 6" in message


MASTER = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


def test_too_few_processes_under_a_launcher(tiny):
    overrides = ["run.name=alone", "parallel.pipeline_model_parallel_size=2"]
    result = run_cli("train", tiny.path, *overrides, WORLD_SIZE="1", RANK="0", **MASTER)
    assert result.returncode == 2
    assert result.stderr.startswith("error: the number of processes (WORLD_SIZE or --nproc) is 1")
    assert "start 2 processes" in result.stderr
    assert not (tiny.folder / "runs" / "alone").exists()


def test_a_missing_config_file_is_named_with_what_is_beside_it(tiny, capsys):
    assert main(["train", str(tiny.folder / "tinny.yaml")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "tinny.yaml" in message


@pytest.mark.parametrize("ending", [".idx", ".bin"])
def test_truncated_token_files(refuse, tmp_path, ending):
    prefix = write_indexed(tmp_path / "tokens", [[1, 2, 3] * 40] * 20)
    overrides = [f"data.corpus=[{{kind: indexed, path: {prefix}}}]", "data.tokenizer.kind=none"]
    damaged = Path(prefix + ending)
    os.truncate(damaged, damaged.stat().st_size - 5)
    message = refuse(*overrides, f"data.cache_dir={tmp_path / 'cache'}")
    assert f"{damaged} is truncated: expected" in message


def test_a_tokenizer_that_is_larger_than_the_model(refuse, tmp_path):
    path = tmp_path / "tokenizer.json"
    words = {f"word{i}": i for i in range(500)} | {"<|endoftext|>": 500}
    tokenizer = Tokenizer(models.WordLevel(words, "word0"))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path))
    message = refuse("data.tokenizer.kind=file", f"data.tokenizer.path={path}")
    assert f"{path} has a vocabulary of 501, but model.vocab_size is 300" in message


def test_a_folder_without_a_checkpoint(refuse, tmp_path):
    message = refuse(f"checkpoint.resume={tmp_path}")
    assert f"no checkpoint (step_*) in {tmp_path}" in message


def test_a_broken_checkpoint_is_refused_with_a_list_of_whole_ones(refuse, tiny, tmp_path):
    run = tiny.train("whole-1x1", *grid(1, 1))
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    whole, broken = sorted((tmp_path / "checkpoints").iterdir())
    os.truncate(next(broken.glob("*.safetensors")), 100)
    message = refuse(f"checkpoint.resume={broken}")
    assert f"checkpoint.resume={broken}: " in message
    assert f"{whole} (complete)" in message


def test_a_run_folder_that_cannot_be_made(refuse, tmp_path):
    (tmp_path / "file").touch()
    message = refuse(f"run.dir={tmp_path / 'file'}")
    assert f"run.dir: the run folder {tmp_path / 'file' / 'refused'} cannot be made" in message


def test_a_run_folder_in_use(refuse, tmp_path):
    folder = tmp_path / "refused"
    folder.mkdir()
    with run_lock(folder):
        message = refuse(f"run.dir={tmp_path}")
    assert f"run.name: {folder} is in use by process {os.getpid()} on " in message
    with run_lock(folder):
        pass


def test_validation_data_that_is_too_short(refuse):
    message = refuse("train.seq_length=4000", "train.global_batch_size=8")
    assert "train.seq_length + 1 = 4001" in message and "data.corpus.0 (text " in message
    assert "no corpus is large enough to validate on" in message


def test_config_prints_derived_values(tiny, capsys):
    assert main(["config", str(tiny.path), "parallel.pipeline_model_parallel_size=2"]) == 0
    printed = capsys.readouterr().out
    assert "8 sublayers / 3 per block = 3 blocks, + embedding = 4 sources" in printed
    assert "2 ranks x 1 virtual stage" in printed


def test_schema_documents_every_key(capsys):
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(CONFIG) <= set(schema["properties"])
    for section in schema["$defs"].values():
        for name, field in section["properties"].items():
            assert field.get("description"), name


def test_data_prepares_once(tmp_path, capsys):
    path = write_config(tmp_path)
    assert main(["data", str(path)]) == 0
    first = capsys.readouterr().err
    assert "training a byte-level BPE of 300 tokens" in first
    assert "unigram entropy" in first
    assert main(["data", str(path)]) == 0
    assert "training a byte-level BPE" not in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["train"], ["schema", "extra=1"], ["train", "x.yaml", "--fast"]]
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: attnres-train" in capsys.readouterr().err


def test_overrides_may_stand_on_both_sides_of_an_option(refuse):
    message = refuse("train.train_iters=x", "--nproc", "1", "train.seq_length=y")
    assert "2 problems" in message


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--learning_rate=3e-4"], "--learning_rate=3e-4: did you mean optimizer.lr=3e-4?"),
        (["--train-iters", "5"], "--train-iters 5: did you mean train.train_iters=5?"),
        (["pp", "2"], "pp 2: did you mean parallel.pipeline_model_parallel_size=2?"),
        (["train.train_iters:", "5"], "did you mean train.train_iters=5?"),
        (["--nprocs", "2"], "--nprocs 2: did you mean --nproc 2?"),
        (["n_layers=2"], "n_layers (command line): unknown key; did you mean model.num_layers=2?"),
    ],
)
@pytest.mark.parametrize("around", [[[], []], [["--nproc", "1"], ["run.seed=3"]]], ids=str)
def test_words_in_another_form(refuse, words, told, around):
    before, after = around
    assert told in refuse(*before, *words, *after)


def test_options_before_the_config(tiny, capsys):
    assert main(["train", "--lr", "3e-4", str(tiny.path), "--nproc", "1"]) == 2
    assert capsys.readouterr().err == "error: --lr 3e-4: did you mean optimizer.lr=3e-4?\n"


@pytest.mark.parametrize("command", ["plan", "data", "config", "report", "import"])
def test_every_command_with_a_config_answers_alike(command, tiny, capsys):
    named = ["weights"] if command == "import" else []
    assert main([command, *named, str(tiny.path), "--max-steps", "5", "tp=1"]) == 2
    assert capsys.readouterr().err == "error: --max-steps 5: did you mean train.train_iters=5?\n"


def test_the_options_of_a_command_work_anywhere(tiny, capsys):
    outputs = []
    for words in (
        ["--json", str(tiny.path), "run.seed=3"],
        [str(tiny.path), "run.seed=3", "--json"],
    ):
        assert main(["config", *words]) == 0
        outputs.append(json.loads(capsys.readouterr().out))
    assert outputs[0] == outputs[1]
    assert outputs[0]["run"]["seed"] == 3
    with pytest.raises(SystemExit) as ended:
        main(["train", str(tiny.path), "--lr", "3", "-h"])
    assert ended.value.code == 0
    assert "KEY=VALUE" in capsys.readouterr().out


def test_options_are_not_guessed_from_their_beginning(tiny, capsys):
    assert main(["config", str(tiny.path), "--js"]) == 2
    assert "--js: did you mean --json?" in capsys.readouterr().err


def test_modules_beside_the_user_are_found_by_the_console_script_too(tiny, tmp_path):
    (tmp_path / "lab").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "lab" / "my_lab.py").write_text("Other = 1\n")
    script = tmp_path / "bin" / "attnres-train"
    script.write_text("import sys\nfrom attnres_train.__main__ import main\nsys.exit(main())\n")
    arguments = ["config", str(tiny.path), "data.corpus=[{kind: 'my_lab:Mine'}]"]
    for start in ([str(script)], ["-m", "attnres_train"]):
        done = subprocess.run(
            [sys.executable, *start, *arguments],
            cwd=tmp_path / "lab",
            env=os.environ | {"PYTHONPATH": str(Path(attnres_train.__file__).parents[1])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert f"module my_lab ({tmp_path / 'lab' / 'my_lab.py'}) has no Mine" in done.stderr


def test_help_and_version_in_their_own_process():
    listing = run_cli("--help")
    assert listing.returncode == 0
    for name in ("train", "data", "config", "options", "plan", "schema", "report", "doctor"):
        assert f"  {name} " in listing.stdout
    assert run_cli("--version").stdout.strip().count(".") == 2


@pytest.mark.parametrize("key", ["run.name", "run.dir"])
def test_a_run_folder_that_is_imported_into_has_its_name(tmp_path, capsys, key):
    assert main(["import", "weights", str(tmp_path), f"{key}=x"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {key}=x: {tmp_path} is a run folder, which has a name: ")
    assert f"name its config, {tmp_path}/config.yaml, instead of the folder" in told


def test_a_working_directory_that_is_gone(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["config", "quickstart"]) == 2
    told = "error: the working directory is not there any more: cd to one that is\n"
    assert capsys.readouterr().err == told
