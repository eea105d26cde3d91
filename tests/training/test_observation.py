"""What an observed step shows is the same on every grid, and changes nothing that is trained."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist

from attnres_train.config import load_config
from attnres_train.data.prepare import prepare
from attnres_train.model.chunk import ModelChunk
from attnres_train.observe.observed import Arrays, read_observation
from attnres_train.supervise.watch import Pulse
from attnres_train.training import building
from attnres_train.training.observation import sublayer_of
from attnres_train.training.trainer import Trainer
from tests.parity.steps import joined_in_fp64
from tests.tiny import column, free_port, grid, saved_tensors

COMMON = [
    "train.seq_length=16",
    "train.micro_batch_size=2",
    "train.global_batch_size=8",
    "optimizer.lr=0.001",
]
GRIDS = {
    "PP2V2": (2, grid(2, 2)),
    "DP2": (2, []),
    "TP2": (2, ["parallel.tensor_model_parallel_size=2"]),
    "CP2": (2, ["parallel.context_parallel_size=2"]),
    "EP2": (2, ["parallel.expert_model_parallel_size=2"]),
    "full, PP2": (2, ["model.residual.kind=full", *grid(2, 1)]),
}


def observe(path: str, overrides: Sequence[str], port: int) -> Arrays | None:
    """Runs on every rank: two steps in fp64, the second of them observed."""
    config = load_config(path, [*COMMON, *overrides])
    with joined_in_fp64(config, port) as (ranks, _):
        parts = building.build_parts(config, ranks, prepare(config, progress=False), Pulse())
        trainer = Trainer(config, ranks, parts)
        trainer.observation.last_step = 2
        trainer.train_step()
        assert trainer.observed is None
        trainer.train_step()
        dist.barrier()
    return trainer.observed


@pytest.fixture(scope="module")
def observed(pool, tiny):
    """Arrays of rank 0 on a grid, those of one process once for all."""
    found: dict[tuple[str, ...], Arrays] = {}

    def of(ranks: int, *overrides: str) -> Arrays:
        key = (str(ranks), *overrides)
        if key not in found:
            call = partial(pool.run, observe, ranks)
            first, *others = call(str(tiny.path), [*overrides], free_port())
            assert all(other is None for other in others)
            found[key] = first
        return found[key]

    return of


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_shows_what_one_process_does(observed, name):
    ranks, overrides = GRIDS[name]
    model = [text for text in overrides if text.startswith("model.")]
    alone, together = observed(1, *model), observed(ranks, *overrides)
    stores = {"store_blocks", "store_bytes"}  # these are the ranks' own
    assert alone.keys() == together.keys() >= {"depth_weight_mean", "output_gradient_rms"} | stores
    for key in alone.keys() - stores:  # float32 of what was computed in fp64
        np.testing.assert_allclose(together[key], alone[key], rtol=3e-7, atol=1e-9, err_msg=key)
    stages = 2 if "pipeline" in "".join(overrides) else 1
    assert together["store_blocks"].shape == (stages,) and (together["store_blocks"] > 0).all()


def test_sums_of_squares_are_those_of_the_whole_gradient(observed, pool, tiny):
    arrays = observed(1)
    from tests.parity.steps import run_steps

    (steps,) = pool.run(run_steps, 1, str(tiny.path), COMMON, free_port(), 2)
    total = np.sqrt((arrays["gradient_norm"].astype(np.float64) ** 2).sum())
    assert total == pytest.approx(steps.grad_norms[1], rel=1e-6)
    of_head = [g for n, g in steps.gradients[1].items() if n.startswith(("lm_head", "model.norm"))]
    of_head += [g for n, g in steps.gradients[1].items() if n.startswith("model.output_attn_res")]
    expected = float(sum(g.square().sum() for g in of_head)) ** 0.5
    assert arrays["gradient_norm"][-1] == pytest.approx(expected, rel=1e-6)


def test_every_parameter_belongs_to_its_sublayer(tiny):
    config = tiny.config().model
    named = dict(ModelChunk(config, 0, config.num_layers, device="meta").named_parameters())
    found = {name: sublayer_of(name, config.num_sublayers) for name in named}
    assert set(found.values()) == set(range(10))
    for name, sublayer in found.items():
        attention = ".self_att" in name or "input_layernorm" in name
        if name.startswith("layers."):
            assert sublayer == 2 * int(name.split(".")[1]) + (1 if attention else 2)


def test_a_run_is_the_same_to_the_bit_with_and_without(tiny):
    without = tiny.train("unobserved", "observe.interval=0", ranks=2)
    observed = tiny.train("observed", "observe.interval=2", ranks=2)
    assert column(observed, "loss") == column(without, "loss")
    left, right = saved_tensors(observed, 6), saved_tensors(without, 6)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert not (without / "observed").exists()
    assert sorted(path.name for path in (observed / "observed").iterdir()) == [
        f"step_0000000{step}.npz" for step in (2, 4, 6)
    ]
    assert read_observation(observed)["depth_weight_mean"].dtype == np.float32
