"""What a checkpoint shows on a text."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from attnres_train.__main__ import main
from attnres_train.commands.inspect import TEXT
from attnres_train.inference.opening import open_model
from attnres_train.model.batch import MicroBatch
from attnres_train.model.probe import Probe
from tests.tiny import grid

WORDS = "one two three"


@pytest.fixture(scope="module")
def trained(tiny):
    return tiny.train("whole-2x2", *grid(2, 2), ranks=2)


def inspected(capsys, *words) -> dict:
    assert main(["inspect", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_weights_are_those_of_the_model_on_the_text(trained, capsys):
    found = inspected(capsys, trained, "--text", WORDS)
    opened = open_model(trained)
    ids = torch.tensor([opened.tokenizer.encode(WORDS)])
    assert found["tokens"] == ids[0].tolist()
    probe = Probe()
    with torch.no_grad():
        opened.chunk(MicroBatch(ids, ids, torch.ones_like(ids) * 1.0, probe=probe), {}, None)
        logits = opened.chunk.logits(MicroBatch(ids, ids, ids.float()), {}, None)[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
    assert found["loss"] == pytest.approx(float(expected), rel=1e-5)
    for sublayer in range(1, 10):
        *sums, count = probe.totals[f"depth_weight/{sublayer}"].tolist()
        row = [weight for weight in found["depth_weight_mean"][sublayer - 1] if weight is not None]
        assert row == pytest.approx([value / count for value in sums[: len(row)]], rel=1e-6)
    assert np.sum(found["expert_load"], 1) == pytest.approx([4] * 3)
    assert not (trained / "inspected").exists()


def test_one_token_alone(trained, capsys, tmp_path):
    found = inspected(capsys, trained, "--text", WORDS, "--token", 1, "--out", tmp_path)
    tokens = range(len(found["tokens"]))
    by_token = [
        inspected(capsys, trained, "--text", WORDS, "--token", i)["token_weights"] for i in tokens
    ]
    assert by_token[1] == found["token_weights"]
    mean = np.mean(np.array(by_token, dtype=float), 0)
    np.testing.assert_allclose(mean, np.array(found["depth_weight_mean"], dtype=float), rtol=1e-5)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"observation.npz", "depth_attention.png", "token_1.png"} <= names


def test_told_to_a_person_and_kept_in_the_run(trained, capsys, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    step = trained / "checkpoints" / "step_00000003"
    assert main(["inspect", str(step), "--file", str(file)]) == 0
    out, err = capsys.readouterr()
    assert "step 3: 32 tokens, loss" in out and "   head   0: " in out
    assert "the first 32 of" in err  # train.seq_length
    folder = trained / "inspected" / "step_00000003"
    assert str(folder) in out and (folder / "magnitudes.png").is_file()


def test_a_residual_without_attention_over_depth(tiny, capsys, tmp_path):
    run = tiny.train("standard", "model.residual.kind=standard", "train.train_iters=1")
    assert main(["inspect", str(run), "--text", WORDS, "--token", "0", "--out", str(tmp_path)]) == 0
    assert "kind standard has no attention over depth" in capsys.readouterr().out
    assert (tmp_path / "magnitudes.png").is_file()
    assert inspected(capsys, run, "--text", "o")["loss"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", ""], "the text has no token"),
        (["--token", "99"], "--token 99: the text has the tokens 0 to 31"),
        (["--token", "-1"], "--token -1"),
        (["--file", "nowhere.txt"], "--file nowhere.txt cannot be read"),
        (["--out", "/dev/null/here"], "--out /dev/null/here cannot be written"),
    ],
)
def test_what_is_the_users_to_mend(trained, capsys, words, message):
    assert main(["inspect", str(trained), *words]) == 2
    assert message in capsys.readouterr().err


def test_no_checkpoint(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
