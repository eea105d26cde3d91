"""Runs whose optimizer is shared out over replicas: saved, resumed, repeated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from attnres_train.checkpoint.folders import step_name
from attnres_train.checkpoint.manifest import read_manifest
from attnres_train.config import load_config
from attnres_train.data.prepare import prepare
from attnres_train.parallel.gathering import ParameterGather
from attnres_train.parallel.meeting import meet
from attnres_train.parallel.ranks import join_run
from attnres_train.supervise.watch import Pulse
from attnres_train.training import building
from attnres_train.training.trainer import Trainer
from tests.parity.expert_runs import Case, run, run_in_turns, worst
from tests.parts import made_whole, the_part
from tests.tiny import STEPS, column, free_port, grid, saved_tensors, torchrun_environment

HALF = STEPS // 2
STOP = f"train.stop_after={HALF}"
MASTERS = "train.precision=bf16_params"
EXPERTS = "parallel.expert_model_parallel_size={}"
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
    # Each tensor is written once, by whichever rank.
    files = (whole / "checkpoints" / step_name(STEPS)).rglob("*.safetensors")
    written = sum(file.stat().st_size for file in files)
    assert 1 <= written / sum(tensor.nbytes for tensor in expected.values()) < 1.25


@pytest.mark.parametrize(("stages", "virtual", "replicas"), [(1, 1, 1), (1, 1, 3), (2, 2, 2)])
def test_every_grid_takes_the_whole_state_over(pool, tiny, stages, virtual, replicas):
    """Not a number differs from the checkpoint's after loading; after a step replicas are equal."""
    half = tiny.train("sharded-halves", *QUICK, STOP, ranks=2)
    saved = saved_tensors(half, HALF)
    arguments = [f"run.name=taken-{replicas}-{stages}", *QUICK, *grid(stages, virtual)]
    arguments.append("train.global_batch_size=6")  # for three replicas, too
    call = [str(tiny.path), *arguments, f"checkpoint.resume={half}/checkpoints/{step_name(HALF)}"]
    by_rank = pool.run(loaded_and_stepped, stages * replicas, call, free_port())
    found: dict[str, torch.Tensor] = {}
    for loaded, _ in by_rank:
        for name, tensor in loaded.items():
            assert torch.equal(tensor, the_part(saved, name, tensor)), name
        found |= loaded
    assert made_whole(found.items()).keys() == saved.keys()
    tables = [name for name in found if "embed_tokens" in name and "optimizer." in name]
    assert len(tables) == 3 * replicas  # its rows are shared out: master and two moments
    kept = [name for loaded, _ in by_rank for name in loaded if name.startswith("optimizer.m")]
    assert len(kept) == len(set(kept)), "state is kept twice"
    after: dict[str, torch.Tensor] = {}
    for _, stepped in by_rank:
        for name, tensor in stepped.items():
            assert torch.equal(tensor, after.setdefault(name, tensor)), f"{name}: replicas differ"
    after = made_whole(after.items())
    masters = [name for name in after if name.startswith("optimizer.master.")]
    assert len(masters) > 100
    for name in masters:
        parameter = after[name.removeprefix("optimizer.master.")]
        assert torch.equal(after[name].bfloat16(), parameter), name
        assert not torch.equal(after[name], saved[name]) or not after[name].any(), name


def loaded_and_stepped(arguments: list[str], port: int) -> tuple[dict, dict]:
    """Runs on every rank: all that it would save, after a resume and after another step."""
    with stepping(arguments, port) as trainer:
        checkpoints = trainer.parts.checkpoints
        trainer.progress = checkpoints.resume()
        loaded = {name: tensor.clone() for name, tensor in checkpoints.tensors.items()}
        trainer.train_step()
        trainer.parts.optimizer.wait()
        return loaded, {name: tensor.clone() for name, tensor in checkpoints.tensors.items()}


@contextmanager
def stepping(arguments: list[str], port: int) -> Iterator[Trainer]:
    """The trainer of one rank, before its first step."""
    config = load_config(arguments[0], arguments[1:])
    with torchrun_environment(port), meet(300) as meeting, join_run(config, meeting) as ranks:
        parts = building.build_parts(config, ranks, prepare(config, progress=False), Pulse())
        yield Trainer(config, ranks, parts)


@dataclass(frozen=True)
class Sixes(Case):
    """Steps of six samples."""

    @property
    def overrides(self) -> list[str]:
        return [*super().overrides, "train.global_batch_size=6"]


def test_a_run_goes_on_with_other_numbers_of_replicas(tiny):
    """Two, one, three: the tables are cut otherwise each time. In fp64, against one process."""
    alone = run(tiny, Sixes(recompute="full"))
    turns = [Sixes(dp=replicas) for replicas in (2, 1, 3)]
    found = run_in_turns(tiny, "two-one-three", turns)
    assert found.losses == pytest.approx(alone.losses, rel=1e-12)
    assert worst(found.saved, alone.saved) < 1e-11
    specs = read_manifest(tiny.folder / "runs/two-one-three/checkpoints" / step_name(3)).tensors
    assert len(specs["optimizer.exp_avg.model.embed_tokens.weight"].parts) == 3
    assert len(specs["model.embed_tokens.weight"].parts) == 1


GRIDS = {
    "TP2-DP2-EP4": (4, ["parallel.tensor_model_parallel_size=2", EXPERTS.format(4)]),
    "CP2-DP2-EP2": (4, ["parallel.context_parallel_size=2", EXPERTS.format(2)]),
    "TP2-DP2-PP2V2-EP2": (
        8,
        ["parallel.tensor_model_parallel_size=2", EXPERTS.format(2), *grid(2, 2)],
    ),
}


@pytest.mark.parametrize(
    "place", [pytest.param(n, marks=[pytest.mark.nightly] * (i > 0)) for i, n in enumerate(GRIDS)]
)
def test_after_a_load_all_who_hold_a_tensor_hold_the_same(pool, tiny, place):
    """With Muon, masters and owners: parameters are the checkpoint's on every rank before anything
    is gathered, and equal after the step."""
    half = tiny.train("sharded-halves", *QUICK, STOP, ranks=2)
    saved, (ranks, overrides) = saved_tensors(half, HALF), GRIDS[place]
    call = [str(tiny.path), f"run.name=loaded-{place}", *QUICK, *overrides]
    call.append(f"checkpoint.resume={half}/checkpoints/{step_name(HALF)}")
    by_rank = pool.run(loaded_and_stepped, ranks, call, free_port())
    for loaded, _ in by_rank:
        for name, tensor in loaded.items():
            assert torch.equal(tensor, the_part(saved, name, tensor)), name
    for turn in (0, 1):
        held = [item for of_rank in by_rank for item in of_rank[turn].items()]
        # Of what several ranks hold it is checked that it is equal.
        assert made_whole(dict(held).items()).keys() == saved.keys()
        together = made_whole(held, once=False)
        masters = [name for name in together if name.startswith("optimizer.master.")]
        assert len(masters) > 100
        for name in masters:
            parameter = together[name.removeprefix("optimizer.master.")]
            assert torch.equal(together[name].bfloat16(), parameter), name


def test_adamw_of_rows_is_that_of_tables_to_the_last_bit(tiny):
    """Unclipped: the norm is summed in another order."""
    few = [*QUICK[:2], "train.clip_grad=0", "optimizer.kind=adamw", "train.train_iters=2"]
    few.append("checkpoint.save_interval=0")
    runs = [
        tiny.train(f"rows-{sharded}", *few, f"optimizer.sharded={sharded}", ranks=2)
        for sharded in ("true", "false")
    ]
    found, expected = (saved_tensors(run, 2) for run in runs)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_a_forgotten_gather_is_seen_by_the_comparison_of_replicas(pool, tiny):
    call = [str(tiny.path), "run.name=apart", *QUICK]
    found = pool.run(compared_without_gather, 2, call, free_port())
    assert found[0] == found[1] and len(found[0]) > 50


def compared_without_gather(arguments: list[str], port: int) -> list[str]:
    """Runs on every rank: what differs between replicas after a step."""
    from attnres_train.checkpoint.drift import drifted

    names = []
    with pytest.MonkeyPatch.context() as patch, stepping(arguments, port) as trainer:
        checkpoints = trainer.parts.checkpoints
        for forget in (False, True):
            if forget:
                patch.setattr(ParameterGather, "start", lambda self: None)
            trainer.train_step()
            trainer.parts.optimizer.wait()
            for group, tensors in checkpoints.replicas.items():
                names += drifted(tensors, group, torch.device("cpu"))
            assert forget or not names
    return names


@pytest.mark.nightly
@pytest.mark.parametrize("place", ["DP2", *GRIDS])
def test_fifty_steps_twice_are_equal_to_the_last_bit(tiny, place):
    few = ["train.seq_length=16", "train.train_iters=50", "checkpoint.save_interval=0"]
    few += ["train.global_batch_size=4"]
    ranks, overrides = GRIDS.get(place, (2, []))
    runs = [
        tiny.train(f"fifty-{place}-{index}", *QUICK, *few, *overrides, ranks=ranks)
        for index in (1, 2)
    ]
    assert len(column(runs[0], "loss")) == 50
    for key in ("loss", "grad_norm"):
        assert column(runs[0], key) == column(runs[1], key)
    first, second = (saved_tensors(run, 50) for run in runs)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
