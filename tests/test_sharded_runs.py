"""Runs whose optimizer is shared out over replicas: saved, resumed, repeated."""

from __future__ import annotations

import pytest
import torch

from attnres_train.checkpoint.folders import step_name
from attnres_train.parallel.gathering import ParameterGather
from tests.parity.pool import RankFailedError
from tests.tiny import STEPS, column, free_port, grid, saved_tensors, train_rank

HALF = STEPS // 2
STOP = f"train.stop_after={HALF}"
MASTERS = "train.precision=bf16_params"
QUICK = ["train.micro_batch_size=1", "train.eval_interval=0", MASTERS]


def test_two_halves_equal_the_whole_bit_for_bit(tiny):
    whole = tiny.train("sharded-whole", *QUICK, ranks=2)
    tiny.train("sharded-halves", *QUICK, STOP, ranks=2)
    halves = tiny.train("sharded-halves", *QUICK, ranks=2)
    assert column(halves, "loss") == column(whole, "loss")
    assert column(halves, "grad_norm") == column(whole, "grad_norm")
    end, expected = saved_tensors(halves, STEPS), saved_tensors(whole, STEPS)
    assert end.keys() == expected.keys() and len(end) > 300
    for name, tensor in expected.items():
        assert torch.equal(tensor, end[name]), name


@pytest.mark.parametrize(("stages", "virtual", "replicas"), [(1, 1, 1), (1, 1, 4), (2, 2, 2)])
def test_every_grid_takes_the_whole_state_over(pool, tiny, stages, virtual, replicas):
    """Not a number differs from the checkpoint's after loading; after a step replicas are equal."""
    half = tiny.train("sharded-halves", *QUICK, STOP, ranks=2)
    saved = saved_tensors(half, HALF)
    arguments = [f"run.name=taken-{replicas}-{stages}", *QUICK, *grid(stages, virtual)]
    call = [str(tiny.path), *arguments, f"checkpoint.resume={half}/checkpoints/{step_name(HALF)}"]
    by_rank = pool.run(loaded_and_stepped, stages * replicas, call, free_port())
    found: dict[str, torch.Tensor] = {}
    for loaded, _ in by_rank:
        for name, tensor in loaded.items():
            assert torch.equal(tensor, saved[name]), name
        found |= loaded
    assert found.keys() == saved.keys()
    kept = [name for loaded, _ in by_rank for name in loaded if name.startswith("optimizer.m")]
    assert len(kept) == len(set(kept)), "state is kept twice"
    after: dict[str, torch.Tensor] = {}
    for _, stepped in by_rank:
        for name, tensor in stepped.items():
            assert torch.equal(tensor, after.setdefault(name, tensor)), f"{name}: replicas differ"
    masters = [name for name in after if name.startswith("optimizer.master.")]
    assert len(masters) > 100
    for name in masters:
        parameter = after[name.removeprefix("optimizer.master.")]
        assert torch.equal(after[name].bfloat16(), parameter), name
        assert not torch.equal(after[name], saved[name]) or not after[name].any(), name


def loaded_and_stepped(arguments: list[str], port: int) -> tuple[dict, dict]:
    """Runs on every rank: all that it would save, after a resume and after another step."""
    from attnres_train import train
    from attnres_train.config import load_config
    from attnres_train.data.prepare import prepare
    from attnres_train.parallel.ranks import join_run
    from attnres_train.supervise.watch import Pulse
    from attnres_train.trainer import Trainer
    from tests.tiny import torchrun_environment

    config = load_config(arguments[0], arguments[1:])
    with torchrun_environment(port), join_run(config) as ranks:
        parts = train.build_parts(config, ranks, prepare(config, progress=False), Pulse())
        trainer = Trainer(config, ranks, parts)
        trainer.progress = parts.checkpoints.resume()
        loaded = {name: tensor.clone() for name, tensor in parts.checkpoints.tensors.items()}
        trainer.train_step()
        parts.optimizer.wait()
        return loaded, {name: t.clone() for name, t in parts.checkpoints.tensors.items()}


def test_replicas_that_were_not_told_are_not_saved(pool, tiny):
    with pytest.raises(RankFailedError, match="the replicas have drifted apart"):
        pool.run(train_without_gather, 2, [str(tiny.path), "run.name=apart", *QUICK], free_port())


def train_without_gather(arguments: list[str], port: int) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ParameterGather, "start", lambda self: None)
        return train_rank(arguments, port)


def test_fifty_steps_twice_are_equal_to_the_last_bit(tiny):
    few = ["train.seq_length=8", "train.train_iters=50", "checkpoint.save_interval=0"]
    few += ["train.global_batch_size=4", "model.num_layers=2"]
    runs = [tiny.train(f"fifty-{index}", *QUICK, *few, ranks=2) for index in (1, 2)]
    assert len(column(runs[0], "loss")) == 50
    for key in ("loss", "grad_norm"):
        assert column(runs[0], key) == column(runs[1], key)
    first, second = (saved_tensors(run, 50) for run in runs)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
