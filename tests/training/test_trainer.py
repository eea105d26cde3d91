"""The training loop on the tiny run: what it logs, what may not change its losses, and that it
learns."""

from __future__ import annotations

import json
import math
from importlib.metadata import version

import pytest
import torch

from attnres_train.checkpoint.folders import step_name
from attnres_train.checkpoint.manifest import read_manifest
from attnres_train.config import load_config
from attnres_train.data.loader import open_data
from attnres_train.data.prepare import open_tokenizer, prepare
from attnres_train.model.flops import training_flops_per_token
from attnres_train.planning.build import build_plan
from tests.parity.pool import RankFailedError
from tests.tiny import (
    SAMPLES,
    STEPS,
    TOKENS,
    column,
    free_port,
    grid,
    records,
    saved_tensors,
    train_rank_told,
)

LOGGED = {
    "step",
    "tokens",
    "loss",
    "grad_norm",
    "lr",
    "tokens_per_second",
    "step_seconds",
    "p2p_bytes",
    "memory_bytes",
    "expert_entropy",
    "expert_violation",
    "expert_rank_load",
    "expert_bytes",
    "tflops",
    "data_share",
    "compute_share",
    "wait_share",
    "reduce_share",
    "optimizer_share",
    "smoothed_loss",
    "time",
    "wall_seconds",
    "flops",
}
OF_PIPELINES = {"bubble", "planned_bubble"}
PIPELINE = grid(2, 2)


@pytest.fixture(scope="module")
def whole(tiny):
    """One process, one chunk."""
    return tiny.train("whole-1x1", *grid(1, 1))


@pytest.fixture(scope="module")
def piped(tiny):
    return tiny.train("whole-2x2", *PIPELINE, ranks=2)


def test_a_record_per_step(whole, piped):
    for run in (whole, piped):
        assert column(run, "step") == list(range(1, STEPS + 1))
        for record in records(run):
            wanted = LOGGED | OF_PIPELINES if run == piped else LOGGED
            assert record.keys() - {"validation_loss", "validation_bits_per_byte"} == wanted
            assert record["tokens"] == record["step"] * TOKENS
            assert record["lr"] == 0.01
            rate = record["tokens_per_second"] * record["step_seconds"]
            assert rate == pytest.approx(TOKENS)
            assert 0 < record["grad_norm"] < math.inf


def test_time_goes_to_what_is_named(whole, piped):
    for run in (whole, piped):
        for record in records(run):
            of_time = [value for key, value in record.items() if key.endswith("_share")]
            assert min(of_time) >= 0 and 0.5 < sum(of_time) <= 1 + 1e-9
            assert record["compute_share"] > 0.1
    assert set(column(whole, "wait_share")) == {0.0}
    assert all(share > 0 for share in column(piped, "wait_share"))
    assert all(0 < bubble < 1 for bubble in column(piped, "bubble"))
    assert len(set(column(piped, "planned_bubble"))) == 1


def test_flops_are_those_of_the_model(tiny, whole, piped):
    per_step = TOKENS * training_flops_per_token(tiny.config().model, 32)
    for run in (whole, piped):
        expected = [step * per_step for step in range(1, STEPS + 1)]
        assert column(run, "flops") == pytest.approx(expected)
    first = records(piped)[0]
    assert first["tflops"] * 1e12 * 2 * first["step_seconds"] == pytest.approx(per_step)


def test_bytes_on_the_wire_are_the_plan_times_micro_batches(tiny, whole, piped):
    units = build_plan(tiny.config(*PIPELINE)).units()
    unit_bytes = 2 * 32 * 32 * 4  # samples x tokens x hidden_size x fp32
    micro_batches = SAMPLES // 2
    assert units.exact == units.bound > 0
    assert column(piped, "p2p_bytes") == [2 * units.exact * micro_batches * unit_bytes] * STEPS
    assert column(whole, "p2p_bytes") == [0] * STEPS


def test_initial_weights_and_losses_do_not_depend_on_the_layout(whole, piped):
    assert column(piped, "loss")[0] == pytest.approx(column(whole, "loss")[0], rel=1e-6)
    for key in ("loss", "validation_loss", "validation_bits_per_byte", "grad_norm"):
        assert column(piped, key) == pytest.approx(column(whole, key), rel=1e-4), key


@pytest.mark.parametrize(("stages", "ranks"), [(1, 2), (2, 4)])
def test_replicas_share_the_batch(tiny, whole, stages, ranks):
    """Each has two micro-batches of a step."""
    layout = [*grid(stages, 1), "checkpoint.save_interval=0", "train.micro_batch_size=1"]
    run = tiny.train(f"replicas-{stages}x{ranks}", *layout, ranks=ranks)
    for key in ("loss", "validation_loss", "validation_bits_per_byte"):
        assert column(run, key) == pytest.approx(column(whole, key), rel=1e-5), key
    assert column(run, "grad_norm") == pytest.approx(column(whole, "grad_norm"), rel=1e-4)
    assert column(run, "tokens") == column(whole, "tokens")


def test_validation_runs_at_its_interval_and_at_the_end(tiny):
    run = tiny.train("validated", "train.eval_interval=4")
    assert [r["step"] for r in records(run) if "validation_loss" in r] == [4, STEPS]
    every = tiny.train("validated-often", "train.eval_interval=1")
    assert column(every, "loss") == column(run, "loss"), "validation disturbs training"
    assert column(every, "validation_loss")[3] == column(run, "validation_loss")[0]


def test_bits_per_byte_are_nats_over_the_bytes_of_the_text_that_they_are_of(tiny, whole):
    config = tiny.config()
    prepared = prepare(config, progress=False)
    tokenizer, data = open_tokenizer(config, prepared), open_data(config, prepared)
    labels = [
        number
        for index in range(config.train.eval_iters)
        for batch in data.validation_batches(index, 0, 1)
        for number in batch["labels"].flatten().tolist()
    ]
    text = tokenizer.decode(number for number in labels if number != tokenizer.eod)
    bits = column(whole, "validation_loss")[-1] / math.log(2) * len(labels)
    expected = bits / len(text.encode())
    assert column(whole, "validation_bits_per_byte")[-1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_bit(tiny, piped, recompute):
    run = tiny.train(recompute, *PIPELINE, f"train.recompute={recompute}", ranks=2)
    for key in ("loss", "grad_norm", "validation_loss"):
        assert column(run, key) == column(piped, key), key


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("gpipe", (*PIPELINE, "pipeline.schedule=gpipe")),
        ("layout-string", (*grid(2, 1), "parallel.layout=Et|tttL")),
        ("layout-auto", (*grid(2, 1), "parallel.layout=auto")),
    ],
)
def test_schedules_and_layouts_train_alike(tiny, whole, name, overrides):
    run = tiny.train(name, *overrides, ranks=2)
    assert column(run, "loss") == pytest.approx(column(whole, "loss"), rel=1e-4)


OWN = "tests.own_schedules:"


def test_schedules_of_the_users_own(tiny, whole):
    """Of the pipeline and of the learning rate, which falls too slowly to change the losses."""
    options = {"pipeline.schedule_options.extra": 2, "lr_schedule.options.timescale": 10**6}
    run = tiny.train(
        "own-schedules",
        *PIPELINE,
        f"pipeline.schedule={OWN}LongWarmUp",
        f"lr_schedule.kind={OWN}InverseSquareRoot",
        *(f"{key}={value}" for key, value in options.items()),
        ranks=2,
    )
    assert column(run, "lr") == [0.01 / math.sqrt(1 + n / 10**6) for n in range(1, STEPS + 1)]
    assert column(run, "loss") == pytest.approx(column(whole, "loss"), rel=1e-4)
    saved = read_manifest(run / "checkpoints" / step_name(STEPS)).extras["config"]
    assert saved["pipeline"]["schedule"] == f"{OWN}LongWarmUp"
    assert saved["pipeline"]["schedule_options"] == {"extra": 2}
    assert saved["lr_schedule"]["kind"] == f"{OWN}InverseSquareRoot"
    assert saved["lr_schedule"]["options"] == {"timescale": 10**6}


def test_a_schedule_that_cannot_be_run_ends_before_step_1(tiny):
    named = "pipeline.schedule tests.own_schedules:WithoutTheLast cannot be run: "
    with pytest.raises(RankFailedError, match=f"{named}.*micro-batch 1.* is never run"):
        tiny.train("unfinished", f"pipeline.schedule={OWN}WithoutTheLast")
    assert not (tiny.folder / "runs" / "unfinished" / "metrics.jsonl").exists()


@pytest.mark.parametrize("precision", ["bf16", "bf16_params"])
def test_half_precision_follows_fp32(tiny, whole, piped, precision):
    run = tiny.train(precision, *PIPELINE, f"train.precision={precision}", ranks=2)
    assert column(run, "loss") != column(whole, "loss")
    assert column(run, "loss") == pytest.approx(column(whole, "loss"), rel=0.03)
    tensors = saved_tensors(run, STEPS)
    weight = "model.layers.0.self_attn.q_proj.weight"
    with_masters = precision == "bf16_params"
    assert tensors[weight].dtype == (torch.bfloat16 if with_masters else torch.float32)
    assert (f"optimizer.master.{weight}" in tensors) == with_masters
    assert [2 * count for count in column(run, "p2p_bytes")] == column(piped, "p2p_bytes")


def test_the_loss_falls_below_the_unigram_entropy(tiny):
    run = tiny.train("long", "train.train_iters=30", "train.eval_interval=0")
    losses = column(run, "loss")
    info = json.loads((run / "info.json").read_text())
    assert losses[0] == pytest.approx(math.log(300), abs=0.05)
    assert losses[-1] < info["unigram_entropy"] < losses[0] - 1


def test_adamw_alone_learns_too(tiny):
    run = tiny.train("adamw", "optimizer.kind=adamw", "train.train_iters=15")
    assert column(run, "loss")[-1] < column(run, "loss")[0] - 0.5


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(tiny):
    with pytest.raises(RankFailedError, match=r"the gradient norm of step \d is (nan|inf)"):
        tiny.train("diverging", "optimizer.lr=1e30", "checkpoint.save_interval=1")
    run = tiny.folder / "runs" / "diverging"
    last = max(column(run, "step"))
    assert last < STEPS
    assert [p.name for p in (run / "checkpoints").iterdir()][-1] == f"step_{last:08d}"


def test_a_signal_to_one_rank_stops_all_after_one_step_saved(tiny):
    run = tiny.folder / "runs" / "told"
    arguments = [str(tiny.path), "run.name=told", *PIPELINE, "train.train_iters=2000"]
    screens = tiny.pool.run(train_rank_told, 2, arguments, free_port(), run)
    step = len(records(run))
    assert 2 <= step < 2000
    assert f"stopped after step {step}, saved; the same command resumes" in screens[0]
    assert (run / "checkpoints" / step_name(step) / "meta.json").is_file()
    resumed = tiny.train("told", *PIPELINE, f"train.train_iters={step + 1}", ranks=2)
    assert column(resumed, "step") == list(range(1, step + 2))


def test_a_signal_between_steps_is_heard_at_the_next_one(tiny):
    """In a validation, before the save of step 3."""
    told = "log.observers=[tests.own_observers:Told]"
    screen = tiny.screen("told-while-validating", *PIPELINE, told, ranks=2)
    run = tiny.folder / "runs" / "told-while-validating"
    assert "stopped after step 4, saved; the same command resumes" in screen
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert saved == [step_name(3), step_name(4)]


def test_the_run_folder_says_what_ran(tiny, piped):
    config = load_config(piped / "config.yaml")
    assert config == tiny.config("run.name=whole-2x2", *PIPELINE)
    environment = json.loads((piped / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["packages"]["torch"] == version("torch")


def test_the_losses_are_drawn(tiny):
    run = tiny.train("drawn", "log.plot=true", "train.train_iters=2")
    assert (run / "loss.png").stat().st_size > 1000


def test_tensorboard_holds_every_step(tiny):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tiny.train("board", "log.tensorboard=true", "train.stop_after=3")
    run = tiny.train("board", "log.tensorboard=true")
    events = accumulators.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("loss")
    assert [scalar.step for scalar in scalars] == column(run, "step")
    assert [scalar.value for scalar in scalars] == pytest.approx(column(run, "loss"))
