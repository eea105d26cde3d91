from __future__ import annotations

import pytest
import torch

from attnres_train.checkpoint.store import load, save
from tests.checkpoint.toy import Toy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_n_steps_and_resume_and_n_steps_equal_2n_steps(tmp_path, kind, dtype):
    straight = Toy(range(3), seed=0, dtype=dtype, kind=kind)
    straight.train(range(1, 7))

    first = Toy(range(3), seed=0, dtype=dtype, kind=kind)
    first.train(range(1, 4))
    path = save(tmp_path, 3, first.state(), {}, keep_last=1)
    second = Toy(range(3), seed=99, dtype=dtype, kind=kind)
    load(path, second.state())
    second.train(range(4, 7))

    expected = straight.state()
    assert expected["optimizer.steps"] == 6
    for name, tensor in second.state().items():
        assert torch.equal(tensor, expected[name]), name
