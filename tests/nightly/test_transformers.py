"""Exported weights, opened by transformers itself: logits and greedy text against ours."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from attnres_train.__main__ import main
from attnres_train.data.tokenizers.hugging_face import train_bpe
from attnres_train.inference.opening import Opened, open_model
from attnres_train.model.batch import MicroBatch
from tests.checkpoint.released import CONFIG, RUN, tensors, write_released, write_run
from tests.data.tiny import sentence
from tests.nightly.environments import interpreter_with
from tests.tiny import environment

pytestmark = pytest.mark.nightly
SCRIPT = Path(__file__).with_name("in_transformers.py")
BOUNDED = {"gate": "lower_bound", "gate_lower_bound": -4.0}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    return interpreter_with(tmp_path_factory.mktemp("packages"), transformers="transformers>=5.24")


def exported(folder: Path, layers_per_block: int | None, **model: Any) -> tuple[Path, Opened]:
    """An export of random weights, and what was exported, opened in fp64."""
    train_bpe((sentence(number) for number in range(50)), 300, folder / "tokenizer.json")
    config = CONFIG | ({"attn_res_block_size": layers_per_block} if layers_per_block else {})
    if "kda" in model:
        linear = CONFIG["linear_attn_config"] | {"gate_lower_bound": -4.0}
        config["linear_attn_config"] = linear
    source = write_released(folder / "source", tensors(layers_per_block), **config)
    if layers_per_block:
        model["residual"] = {
            "kind": "block",
            "block_size": 2 * layers_per_block,
            **model.get("residual", {}),
        }
    tokenizer = {"kind": "file", "path": str(folder / "tokenizer.json")}
    data = {"tokenizer": tokenizer, "split": [0.8, 0.2]}
    run = write_run(folder, model=model, data=data)
    assert main(["import", str(source), str(run)]) == 0
    assert main(["export", str(folder / "r"), str(folder / "exported")]) == 0
    return folder / "exported", open_model(folder / "r", dtype=torch.float64)


def transformers_says(python: str, folder: Path, tokens: Tensor, how: str) -> dict[str, Any]:
    given, wanted = folder / "in.safetensors", folder / "out.safetensors"
    save_file({"tokens": tokens}, given)
    command = [python, str(SCRIPT), str(folder), str(given), str(wanted), how]
    alone = environment(HF_HUB_OFFLINE="1", HF_HOME=str(folder.with_name("hf")))
    result = subprocess.run(
        command, env=alone, capture_output=True, text=True, timeout=3600, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "were not used when initializing" not in result.stderr, result.stderr
    said = result.stdout.splitlines()
    return {"class": said[-2], "ids": said[-1], **load_file(wanted)}


def logits_of(opened: Opened, tokens: Tensor) -> Tensor:
    batch = MicroBatch(tokens, tokens, torch.ones(tokens.shape))
    with torch.no_grad():
        return opened.chunk.logits(batch, {}, None)


def greedy_of(opened: Opened, tokens: Tensor, count: int) -> list[int]:
    """By the full forward of every token."""
    for _ in range(count):
        found = logits_of(opened, tokens)[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, found], dim=1)
    return tokens[0, -count:].tolist()


# Transformers' own class has 1e-6 for the latent's norm, whatever config.json says.
@pytest.mark.parametrize(
    ("layers_per_block", "how", "name", "model"),
    [
        (2, "trust", "AttnResForCausalLM", {}),
        (1, "trust", "AttnResForCausalLM", {"residual": {"norm_eps": 1e-3}}),
        (2, "trust", "AttnResForCausalLM", {"kda": RUN["model"]["kda"] | BOUNDED}),
        (None, "trust", "AttnResForCausalLM", {"mla": RUN["model"]["mla"] | {"kv_norm_eps": 1e-2}}),
        (
            None,
            "native",
            "KimiLinearForCausalLM",
            {"mla": RUN["model"]["mla"] | {"kv_norm_eps": 1e-6}},
        ),
    ],
)
def test_an_export_opens_and_computes_the_same(
    tmp_path, python, layers_per_block, how, name, model
):
    folder, opened = exported(tmp_path, layers_per_block, **model)
    tokens = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(1))
    theirs, ours = transformers_says(python, folder, tokens, how), logits_of(opened, tokens)
    assert theirs["class"] == name
    assert ours.std() > 0.3
    torch.testing.assert_close(theirs["exact"], ours, rtol=0, atol=1e-9)
    assert theirs["ids"] == str(opened.tokenizer.encode("the lazy dog"))


@pytest.mark.parametrize("residual", ["block", "standard"])
def test_greedy_text_of_a_trained_model(tmp_path, python, tiny, residual):
    """With caches and without, as ours by the full forward of every token."""
    blocks = "{kind: block, block_size: 4}"
    kind = blocks if residual == "block" else "{kind: standard}"
    overrides = (f"model.residual={kind}", "train.train_iters=60", "checkpoint.save_interval=60")
    run = tiny.train(f"exported-{residual}", *overrides, "train.eval_interval=0")
    folder = tmp_path / "exported"
    assert main(["export", str(run), str(folder)]) == 0
    # Its weights are bf16, unlike the run's.
    tokenizer = f"data.tokenizer={{kind: file, path: {folder}}}"
    again = [f"run.dir={tmp_path}", "run.name=again", tokenizer]
    assert main(["import", str(folder), str(run / "config.yaml"), *again]) == 0
    opened = open_model(tmp_path / "again", dtype=torch.float64)
    assert opened.tokenizer is not None
    tokens = torch.tensor([opened.tokenizer.encode("the quick brown fox")])
    theirs, ours = transformers_says(python, folder, tokens, "trust"), logits_of(opened, tokens)
    torch.testing.assert_close(theirs["exact"], ours, rtol=0, atol=1e-9)
    torch.testing.assert_close(theirs["logits"].double(), ours, rtol=0, atol=1e-4)
    expected = greedy_of(opened, tokens, len(theirs["greedy"]))
    assert len(set(expected)) > 4
    assert theirs["greedy"].tolist() == theirs["uncached"].tolist() == expected


def test_without_its_code_an_export_with_blocks_is_refused(tmp_path, python):
    """It is not taken for a model without Attention Residuals."""
    folder, _ = exported(tmp_path, 2)
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(AssertionError, match=r"trust_remote_code|does not recognize"):
        transformers_says(python, folder, tokens, "native")


def test_an_export_is_imported_again(tmp_path):
    folder, opened = exported(tmp_path, 2)
    run = tmp_path / "run.yaml"
    assert main(["import", str(folder), str(run), "run.name=again"]) == 0
    tokens = torch.arange(30)[None]
    again = open_model(tmp_path / "again", dtype=torch.float64)
    assert torch.equal(logits_of(again, tokens), logits_of(opened, tokens))
