"""`attnres-train config`: the whole configuration, where it comes from and what follows from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnres_train.__main__ import main
from attnres_train.config import load_config
from attnres_train.config.fields import all_keys, holds_sections

ROOT = Path(__file__).parents[2]
QUICKSTART = "configs/quickstart.yaml"


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["config", *arguments]) == 0
    return capsys.readouterr().out


def line(text: str, key: str) -> str:
    (found,) = [one for one in text.splitlines() if one.strip().startswith(f"{key}: ")]
    return " ".join(found.split())


def test_the_output_is_the_whole_configuration_and_loads_again(capsys, tmp_path):
    overrides = ["run.name=a  # b", "optimizer.eps=1e-12", "train.eval_iters=7"]
    text = shown(capsys, QUICKSTART, *overrides)
    (tmp_path / "again.yaml").write_text(text)
    assert load_config(tmp_path / "again.yaml") == load_config(QUICKSTART, overrides)
    for key in all_keys():
        if not holds_sections(key) and not key.startswith("log.observers."):
            assert f"{key.rpartition('.')[2]}: " in text


def test_each_value_that_is_no_default_says_where_it_was_written(capsys):
    overrides = ["data.corpus.0.weight=2", "optimizer.betas=[0.8, 0.9]"]
    text = shown(capsys, "configs/compare_block.yaml", *overrides)
    source = Path("configs/compare_block.yaml").read_text().splitlines()
    number = source.index("    kind: block") + 1
    assert f"{'    kind: block':<46}  # configs/compare_block.yaml:{number}\n" in text
    base = Path(QUICKSTART).read_text().splitlines()
    number = next(i for i, one in enumerate(base, 1) if "global_batch_size:" in one)
    assert line(text, "global_batch_size").endswith(f"# {QUICKSTART}:{number}")
    assert line(text, "weight") == "weight: 2.0 # command line"
    assert line(text, "betas") == "betas: [0.8, 0.9] # command line"
    assert line(text, "text_field") == "text_field: text"


def test_what_follows_from_it_stands_below_as_comments_or_alone(capsys):
    whole = shown(capsys, QUICKSTART)
    below = whole.partition("# What follows from it:\n")[2]
    alone = shown(capsys, QUICKSTART, "--derived")
    assert [one.removeprefix("#   ") for one in below.splitlines()] == alone.splitlines()
    found = dict(one.split("  ", 1) for one in alone.splitlines())
    assert found["parameters"].strip() == "3,145,740, active per token 2,113,548 (2 of 8 experts)"
    assert found["precision"].split(":")[0].strip() == "fp32"
    device = "cuda" if torch.cuda.is_available() else "cpu (auto: no CUDA here)"
    assert found["device"].strip().startswith(device)
    assert "16 sublayers / 4 per block = 4 blocks" in found["residual"]


def test_as_json(capsys):
    config = json.loads(shown(capsys, QUICKSTART, "--json", "optimizer.lr=1e-3"))
    assert config["optimizer"]["lr"] == 1e-3
    assert config["model"]["kda"]["gate"] == "softplus"
    derived = json.loads(shown(capsys, "--derived", "--json", QUICKSTART))
    assert {"model", "learning rate", "parameters", "FLOPs", "device"} <= set(derived)


def test_a_config_that_cannot_run_is_told_without_torch():
    code = (
        "import sys; from attnres_train.__main__ import main\n"
        f"code = main(['config', {QUICKSTART!r}, 'train.global_batch_size=7'])\n"
        "sys.exit(0 if code == 2 and 'torch' not in sys.modules else 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "train.global_batch_size 7" in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, "-m", "attnres_train", "options"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_every_stage_with_what_follows_from_it(capsys):
    text = shown(capsys, "configs/stages.yaml", "--derived")
    assert "4 samples x 1024 = 4,096 per step, x 20 steps" in text
    assert text.index("stage pretrain (1 of 2)") < text.index("stage anneal (2 of 2)")
    derived = json.loads(shown(capsys, "--derived", "--json", "configs/stages.yaml"))["stages"]
    assert derived["pretrain"]["learning rate"] == "0.004 from step 10"
    assert derived["anneal"]["learning rate"].endswith("linear from step 0 to 0 at step 20")
