"""A run in stages: one count of steps, data and schedule of each stage's own, resumed anywhere."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from attnres_train.__main__ import main
from attnres_train.checkpoint import store
from attnres_train.checkpoint.folders import step_name
from attnres_train.checkpoint.manifest import read_manifest
from attnres_train.config.stages import stage_configs
from attnres_train.data.loader import open_data
from attnres_train.runs.preparation import prepare_stages
from attnres_train.runs.progress import Progress, Spikes
from attnres_train.runs.stages import entered
from attnres_train.training.roll_back import _chosen
from tests.data.tiny import write_text
from tests.in_fp64 import run_in_fp64
from tests.parity.expert_runs import worst
from tests.parity.pool import RankFailedError
from tests.tiny import TinyRuns, column, grid, records, saved_tensors, write_config

FIRST, SECOND = 3, 4
STEPS = FIRST + SECOND
STOP = "train.stop_after={}".format


@pytest.fixture(scope="module")
def runs(tmp_path_factory, pool) -> TinyRuns:
    return Staged(tmp_path_factory.mktemp("stages"), pool)


@pytest.fixture
def own_runs(tmp_path, pool) -> TinyRuns:
    """With corpora of their own."""
    return Staged(tmp_path, pool)


class Staged(TinyRuns):
    """The tiny run in two stages: longer samples of another corpus, kept apart at documents, with
    the learning rate down to 0 and resting router biases in the second."""

    def __init__(self, folder: Path, pool: Any) -> None:
        super().__init__(folder, pool)
        write_text(folder / "more", 16, 40, first=900)
        self.path = write_config(folder, stages=stages(folder))


def stages(folder: Path) -> list[dict[str, Any]]:
    return [
        {"name": "first", "train": {"train_iters": FIRST, "global_batch_size": 8}},
        {
            "name": "second",
            "train": {"train_iters": SECOND, "seq_length": 64, "global_batch_size": 4},
            "optimizer": {"lr": 0.005},
            "lr_schedule": {"kind": "wsd", "wsd_decay_iters": 2, "min_lr_ratio": 0},
            "data": {
                "corpus": [{"kind": "text", "path": str(folder / "more")}],
                "reset_at_documents": True,
            },
            "model": {"moe": {"bias_update_rate": 0}},
        },
    ]


@pytest.fixture(scope="module")
def whole(runs):
    """Both stages in one go."""
    return runs.train("whole")


def meta(run: Path, step: int) -> dict[str, Any]:
    extras: dict[str, Any] = read_manifest(run / "checkpoints" / step_name(step)).extras
    return extras


def same_end(one: Path, other: Path) -> bool:
    a, b = saved_tensors(one, STEPS), saved_tensors(other, STEPS)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_one_run_of_two_stages(runs, whole):
    assert column(whole, "step") == list(range(1, STEPS + 1))
    assert column(whole, "stage") == [0] * FIRST + [1] * SECOND
    assert column(whole, "tokens") == [n * 256 for n in range(1, STEPS + 1)]
    assert column(whole, "lr") == [0.01] * FIRST + [0.005, 0.005, 0.0025, 0.0]
    assert [r["step"] for r in records(whole) if "validation_loss" in r] == [3, 6, 7]
    progress = meta(whole, STEPS)["progress"]
    place = {"step": STEPS, "stage": 1, "began": FIRST, "samples": 4 * SECOND, "tokens": 1792}
    assert place.items() <= progress.items()
    screen = runs.screen("whole")
    assert "stage first (1 of 2)" in screen and "stage second (2 of 2)" in screen
    assert f"step {STEPS}/{STEPS} " in screen and "stopped" not in screen


def test_router_biases_rest_in_the_last_stage_and_weights_do_not(whole):
    border, end = saved_tensors(whole, 6), saved_tensors(whole, STEPS)
    biases = [n for n in border if n.endswith("e_score_correction_bias")]
    assert biases and any(border[name].any() for name in biases)
    first = saved_tensors(whole, FIRST) if (whole / "checkpoints" / step_name(3)).is_dir() else {}
    for name in biases:
        assert torch.equal(border[name], end[name])
        assert not first or torch.equal(first[name], end[name])
    steps = border["optimizer.steps"], end["optimizer.steps"]
    assert [int(one) for one in steps] == [6, STEPS]


def test_the_second_stage_begins_with_sample_0_of_its_data(runs, whole):
    config = runs.config("run.name=not-begun")
    first, second = prepare_stages(config, progress=False)
    assert (first.stage, second.stage) == (0, 1)
    assert first.prepared.tokenizer_path == second.prepared.tokenizer_path
    assert first.prepared.sources[0].content != second.prepared.sources[0].content
    record = json.loads((whole / "data.json").read_text())
    assert record["seq_length"] == 64
    assert record["corpora"][0]["digest"] == second.prepared.sources[0].content
    (past,) = record["past"]
    assert (past["stage"], past["until_step"], past["seq_length"]) == (0, FIRST, 32)
    assert past["corpora"][0]["digest"] == first.prepared.sources[0].content
    (begins,) = json.loads((whole / "history" / f"{step_name(FIRST)}.json").read_text())["data"]
    assert begins == "stage second (2 of 2) begins, with sample 0 of its data"


NIGHTLY = pytest.mark.nightly


@pytest.mark.parametrize(
    "stop", [pytest.param(2, marks=NIGHTLY), FIRST, pytest.param(5, marks=NIGHTLY)]
)
def test_stopped_anywhere_and_resumed_is_the_same_to_the_bit(runs, whole, stop):
    """Within the first stage, on the border, within the second."""
    name = f"stopped-{stop}"
    screen = runs.screen(name, STOP(stop))
    assert f"stopped after step {stop}, saved" in screen
    run = runs.train(name)
    assert column(run, "loss") == column(whole, "loss")
    assert column(run, "validation_loss")[-2:] == column(whole, "validation_loss")[-2:]
    assert same_end(run, whole)
    assert "changed since" not in runs.screen(name)


@pytest.fixture(scope="module")
def in_fp64(runs):
    """Both stages in one go, on one process."""
    return run_in_fp64(runs, "whole-fp64")


@pytest.mark.parametrize(
    ("name", "layout"), [("pp", grid(2, 2)), pytest.param("dp", grid(1, 1), marks=NIGHTLY)]
)
def test_pipelines_and_replicas(runs, in_fp64, name, layout):
    """As one process, across the border: another length, batch and learning rate."""
    run = run_in_fp64(runs, f"{name}-fp64", *layout, ranks=2)
    assert column(run, "step") == list(range(1, STEPS + 1))
    for key in ("tokens", "stage", "lr"):
        assert column(run, key) == column(in_fp64, key)
    for key in ("loss", "grad_norm", "validation_loss"):
        assert column(run, key) == pytest.approx(column(in_fp64, key), rel=1e-9), key
    assert worst(saved_tensors(run, STEPS), saved_tensors(in_fp64, STEPS)) < 1e-9


@pytest.mark.nightly
def test_a_stage_that_has_not_begun_may_become_another(own_runs):
    run = own_runs.train("free", STOP(2))
    changed = ["stages.1.train.train_iters=2", "stages.1.optimizer.lr=0.002"]
    changed += ["stages.1.train.seq_length=32", "stages.1.lr_schedule.min_lr_ratio=1"]
    screen = own_runs.screen("free", *changed)
    assert "changed since" not in screen  # before it begins there is nothing that it changes
    assert column(run, "lr") == [0.01] * FIRST + [0.002] * 2
    again = own_runs.train("free", *changed, "stages.1.train.train_iters=3")
    assert column(again, "step") == [1, 2, 3, 4, 5, 6]


@pytest.mark.nightly
def test_data_of_a_stage_that_is_over_may_be_gone(own_runs, capsys):
    run = own_runs.train("gone", STOP(FIRST))
    shutil.rmtree(own_runs.folder / "corpus")
    shutil.rmtree(own_runs.folder / "cache")
    own_runs.train("gone", STOP(5))
    own_runs.train("gone")
    assert column(run, "step") == list(range(1, STEPS + 1))
    assert main(["report", str(run)]) == 0
    told = capsys.readouterr().out
    assert "stages  stage first (1 of 2): steps 1 to 3, over" in told
    assert "stage second (2 of 2): steps 4 to 7, over" in told
    assert "train.seq_length 32 -> 64 after step 3" in told
    assert "stage second (2 of 2) begins, with sample 0 of its data after step 3" in told


def test_what_is_over_cannot_become_another(own_runs):
    own_runs.train("over", STOP(5))
    with pytest.raises(RankFailedError) as refused:
        own_runs.train("over", "stages.0.train.train_iters=2", "optimizer.lr=0.002")
    told = str(refused.value)
    assert "stages.0.train.train_iters 3 -> 2" in told
    assert "stages.0.optimizer.lr 0.01 -> 0.002" in told
    assert "stages.1, and others after it, may have their own" in told
    with pytest.raises(RankFailedError, match=r"stages\.1\.name second -> other"):
        own_runs.train("over", "stages.1.name=other")
    with pytest.raises(RankFailedError, match=r"stages\.1\.train\.seq_length 64 -> 32 \(data\)"):
        own_runs.train("over", "stages.1.train.seq_length=32")
    one = yaml.safe_load(own_runs.path.read_text())
    own_runs.path.write_text(yaml.safe_dump(one | {"stages": one["stages"][:1]}))
    with pytest.raises(RankFailedError, match="in stage 2, but there is 1: put back what is miss"):
        own_runs.train("over", STOP(6))
    own_runs.path.write_text(yaml.safe_dump(one))
    screen = own_runs.screen("over", "stages.1.optimizer.lr=0.001", STOP(6))
    assert "changed since step 5: optimizer.lr 0.005 -> 0.001" in screen


@NIGHTLY
def test_a_run_without_stages_goes_on_as_the_first_of_two(own_runs):
    one = yaml.safe_load(own_runs.path.read_text())
    two = one.pop("stages")
    own_runs.path.write_text(yaml.safe_dump(one | {"train": one["train"] | two[0]["train"]}))
    run = own_runs.train("grown")
    assert "stage" not in records(run)[0]
    own_runs.path.write_text(yaml.safe_dump(one | {"stages": two}))
    own_runs.train("grown", "log.interval=1")
    assert column(run, "stage") == [1] * SECOND
    config = own_runs.config("run.name=grown", "stages.1.train.train_iters=9")
    (second,) = prepare_stages(config, progress=False)
    assert second.stage == 1
    batches = open_data(stage_configs(config)[1], second.prepared).micro_batches(0, 0, 1)
    assert [batch["tokens"].shape for batch in batches] == [(2, 64)] * 2
    assert all(batch["cu_seqlens"][-1] == 128 for batch in batches)


def test_where_a_run_stands(runs):
    config = runs.config()
    recent = Spikes(recent=[3.0, 2.0], since=2, count=1, before=[2])
    within = Progress(2, 16, 512, spikes=recent)
    assert entered(config, within) == within
    border = entered(config, replace(within, step=FIRST))
    kept = Spikes(count=1, before=[2])
    assert border == Progress(FIRST, 0, 512, spikes=kept, stage=1, began=FIRST)
    assert entered(config, border) == border
    done = replace(border, step=STEPS)
    assert entered(config, done) == done


def test_no_roll_back_goes_beyond_a_border(tmp_path):
    for step in (2, 3, 5):
        store.save(tmp_path, step, {"weight": torch.zeros(1)}, {}, keep_last=3)
    newest = tmp_path / step_name(5)
    again = Progress(6, spikes=Spikes(back_to=5))
    assert _chosen(newest, replace(again, began=4)) == newest
    assert _chosen(newest, replace(again, began=3)) == tmp_path / step_name(3)
    assert _chosen(newest, replace(again, began=0)) == tmp_path / step_name(3)


@NIGHTLY
def test_where_the_newest_is_damaged_and_the_one_before_is_of_another_stage(own_runs):
    kept = ("checkpoint.save_interval=1", "checkpoint.keep_last=9")
    run = own_runs.train("damaged", STOP(4), *kept)
    for step in (3, 4):
        tensors = run / "checkpoints" / step_name(step) / "rank_00000.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")
    with pytest.raises(RankFailedError) as refused:
        own_runs.train("damaged", STOP(5), *kept)
    assert f"{step_name(2)}, is of stage first (1 of 2): give the same command" in str(
        refused.value
    )
    own_runs.train("damaged", STOP(5), *kept)
    assert column(run, "step") == [1, 2, 3, 4, 5]
    assert len(list((run / "checkpoints").glob("*.damaged"))) == 2
