"""QK-clip in a run: masters and parameters of all replicas stay one, steps that are left out leave
it out, it is logged, and nothing of it is lost by stopping."""

from __future__ import annotations

import pytest
import torch

from attnres_train.config import ConfigError, check_config
from tests.tiny import column, grid, saved_tensors
from tests.training.test_nonfinite import EVERY, poison

THRESHOLD = 0.01
WORDS = [
    *EVERY,
    f"optimizer.qk_clip={THRESHOLD}",
    "train.precision=bf16_params",
    "train.train_iters=4",
    "checkpoint.drift_interval=1",
    poison(2),
]


@pytest.fixture(scope="module")
def clipped(tiny):
    """On two replicas, which are compared after every step; the second one is left out."""
    return tiny.train("clipped", *WORDS, ranks=2)


def test_masters_and_parameters_stay_one(clipped):
    saved = saved_tensors(clipped, 4)
    masters = {n.removeprefix("optimizer.master."): n for n in saved if ".master." in n}
    assert any("q_proj" in name for name in masters) and any("kv_b" in name for name in masters)
    for name, master in masters.items():
        assert torch.equal(saved[master].bfloat16(), saved[name]), name


def test_the_largest_logit_of_all_samples_and_stages_is_logged(clipped, tiny):
    logged = column(clipped, "max_attention_logit")
    assert len(logged) == 4 and logged[0] > THRESHOLD and min(logged) > 0
    piped = tiny.train("clipped-piped", *WORDS, *grid(2, 2), "train.stop_after=1", ranks=2)
    assert column(piped, "max_attention_logit") == pytest.approx(logged[:1], rel=0.01)


def test_a_step_that_is_left_out_clips_nothing(clipped):
    before, after = saved_tensors(clipped, 1), saved_tensors(clipped, 2)
    assert column(clipped, "skipped_steps") == [1, 1, 1]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.nightly
def test_a_stopped_run_goes_on_as_it_would_have(clipped, tiny):
    tiny.train("clipped-halves", *WORDS, "train.stop_after=3", ranks=2)
    halves = tiny.train("clipped-halves", *WORDS, ranks=2)
    assert column(halves, "max_attention_logit") == column(clipped, "max_attention_logit")
    found, expected = saved_tensors(halves, 4), saved_tensors(clipped, 4)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_model_without_mla_has_nothing_to_clip(tiny):
    words = ["optimizer.qk_clip=100", "model.full_attention_layers=[]"]
    with pytest.raises(ConfigError, match=r"optimizer\.qk_clip is 100, but it scales heads of MLA"):
        check_config(tiny.config(*words))
