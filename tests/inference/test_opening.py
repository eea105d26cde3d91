"""A model and its tokenizer from a run folder, a step folder, an imported run, whatever layout
wrote them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from attnres_train.checkpoint.folders import step_name
from attnres_train.commands.import_ import import_weights
from attnres_train.errors import UserError
from attnres_train.inference.opening import Opened, open_model
from attnres_train.model.batch import MicroBatch
from attnres_train.model.naming import released_tensors
from tests.checkpoint.released import tensors, write_released, write_run
from tests.tiny import STEPS, TinyRuns, grid, saved_tensors

TEXT = "A text of words.\n"


def loss_of(opened: Opened, text: str = TEXT) -> torch.Tensor:
    assert opened.tokenizer is not None
    tokens = torch.tensor([opened.tokenizer.encode(text)])
    assert opened.tokenizer.decode(tokens[0].tolist()) == text
    mask = torch.ones_like(tokens[:, 1:], dtype=torch.float32)
    loss = opened.chunk(MicroBatch(tokens[:, :-1], tokens[:, 1:], mask), {}, None).loss
    assert loss is not None
    return loss


@pytest.mark.parametrize("ranks", [1, 2])
def test_any_layout(tiny: TinyRuns, ranks: int) -> None:
    run = tiny.train(f"opened-{ranks}", *(grid(2, 2) if ranks > 1 else ()), ranks=ranks)
    opened = open_model(run)
    assert (opened.step, opened.path) == (STEPS, run / "checkpoints" / step_name(STEPS))
    assert opened.config.model.num_layers == 4
    assert not opened.chunk.training
    saved = saved_tensors(run, STEPS)
    for name, tensor in released_tensors(opened.chunk.state_dict().items()):
        assert torch.equal(tensor, saved[name])
    assert not loss_of(opened).requires_grad

    before = open_model(run / "checkpoints" / step_name(3), dtype=torch.float64)
    assert before.step == 3
    assert before.chunk.lm_head.weight.dtype == loss_of(before).dtype == torch.float64
    assert before.chunk.lm_head.weight.float().equal(saved_tensors(run, 3)["lm_head.weight"])


def test_an_imported_run_with_a_tokenizer_of_its_own(tiny: TinyRuns, tmp_path: Path) -> None:
    kept = next((tiny.train("opened-1") / "tokenizer").glob("*"))
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    shutil.copy(kept, tokenizer / "tokenizer.json")
    source = write_released(tmp_path / "source", tensors(None))
    asked = f"data.tokenizer={{kind: file, path: {tokenizer}}}"
    import_weights(str(source), str(write_run(tmp_path)), [asked])
    opened = open_model(tmp_path / "r")
    assert opened.step == 0
    assert loss_of(opened).isfinite()


def test_what_is_refused(tiny: TinyRuns, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny.train("opened-1"), run)
    for path, told in ((tmp_path, "checkpoint"), (tmp_path / "gone", "there is no such folder")):
        with pytest.raises(UserError, match=rf"{told}.*: name a run folder or a step folder"):
            open_model(path)
    for device, told in (("cuda:99", "there is none here"), ("gpu", "it is cpu, cuda")):
        with pytest.raises(UserError, match=f"device {device}: {told}"):
            open_model(run, device)

    file = next((run / "tokenizer").glob("*"))
    content = json.loads(file.read_text())
    content["version"] = "2.0"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"another tokenizer than .*tokenizer\.json: its file has"):
        open_model(run)
    file.unlink()
    with pytest.raises(UserError, match=r"the tokenizer of .* is missing: there is no file in"):
        open_model(run)
    shutil.rmtree(run / "checkpoints" / step_name(STEPS))
    (run / "checkpoints" / step_name(3) / "rank_00000.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no complete checkpoint.*\n.*step_00000003"):
        open_model(run)
