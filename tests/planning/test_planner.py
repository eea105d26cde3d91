from __future__ import annotations

import argparse
import json

import pytest

from attnres_train.__main__ import main
from attnres_train.commands.plan import print_plan
from attnres_train.config import load_config
from attnres_train.errors import UserError
from attnres_train.planning.machine import add_arguments


def plan(capsys, config: str, *arguments: str, overrides: tuple[str, ...] = ()) -> str:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    code = print_plan(
        load_config(f"configs/{config}.yaml", list(overrides)), parser.parse_args(arguments)
    )
    assert code == 0
    return capsys.readouterr().out


def test_json_of_the_quickstart(capsys):
    report = json.loads(plan(capsys, "quickstart", "--json"))
    assert report["units"] == {
        "standard": 3,
        "naive": 9,
        "padded": 6,
        "paper": 5.0,
        "exact": 4,
        "bound": 4,
    }
    unit = 2 * 256 * 128 * 4  # micro-batch, tokens, hidden size, fp32
    assert report["unit_bytes"] == unit
    assert report["hops"][1] == {
        "src_chunk": 1,
        "dst_chunk": 2,
        "src_rank": 1,
        "dst_rank": 0,
        "held": [],
        "fresh": [2],
        "partial": False,
        "bytes": unit,
    }
    assert report["micro_batches"] == 8
    assert [rank["layers"] for rank in report["ranks"]] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    assert len(report["peak_blocks"]) == 2
    memory = report["ranks"][0]["memory"]
    assert memory["parameters"] == memory["gradients"] == 4 * report["ranks"][0]["parameters"]
    assert memory["block_store"] == report["peak_blocks"][0] * unit
    assert memory["total"] == sum(size for part, size in memory.items() if part != "total")
    schedules = report["schedules"]
    for what in ("peak_blocks", "activations", "memory"):
        assert schedules["gpipe"][what] > schedules["1f1b"][what]
    assert schedules["1f1b"]["memory"] == max(r["memory"]["total"] for r in report["ranks"])
    steps = report["steps"]
    assert list(steps) == ["standard", "naive", "padded", "exact", "eager"]
    assert steps["standard"]["over_standard"] == 0
    assert all(0 < step["mfu"] < 1 and 0 < step["bubble"] < 1 for step in steps.values())


def test_replicas_share_the_micro_batches(capsys):
    report = json.loads(plan(capsys, "quickstart", "--json", "--nproc", "8"))
    assert report["micro_batches"] == 2


def test_rates_scale_the_simulated_step(capsys):
    arguments = ("--json", "--flops-rate", "1e12", "--link-bandwidth", "1e9")
    slow = json.loads(plan(capsys, "quickstart", *arguments))
    arguments = ("--json", "--flops-rate", "2e12", "--link-bandwidth", "2e9")
    fast = json.loads(plan(capsys, "quickstart", *arguments))
    for mode, step in slow["steps"].items():
        assert step["seconds"] == pytest.approx(2 * fast["steps"][mode]["seconds"])
        assert step["over_standard"] == pytest.approx(fast["steps"][mode]["over_standard"])


def test_tables_of_the_48b_model(capsys):
    overrides = ("pipeline_model_parallel_size=9", "virtual_pipeline_model_parallel_size=3")
    overrides = (*(f"parallel.{one}" for one in overrides), "parallel.layout=even")
    text = plan(capsys, "kimi_linear_48b_attnres", "--nproc", "576", overrides=overrides)
    for words in (
        "9 pipeline ranks x 3 virtual stages, 32 micro-batches per step",
        "One unit (a block or partial of a micro-batch) is 18.9 MB.",
        "18 -> 19  0 -> 1   4-6      -     partial  75.5 MB",
        "full history on every hop                   152",
        "exact: this plan                             83",
        "lower bound                                  83",
    ):
        assert words in text


def test_the_tokenizer_of_the_48b_model_is_not_needed_to_plan_it(capsys):
    assert main(["plan", "configs/kimi_linear_48b.yaml", "--nproc", "48"]) == 0
    assert main(["plan", "configs/kimi_linear_48b.yaml", "data.tokenizer.path=null"]) == 2
    assert "data.tokenizer.path is missing" in capsys.readouterr().err


def slowest(report: dict) -> float:
    """FLOPs of the slowest rank over the mean."""
    flops = [rank["flops"] for rank in report["ranks"]]
    return max(flops) / sum(flops) * len(flops)


@pytest.mark.parametrize("residual", ["", "_attnres"])
def test_auto_beats_even_on_the_48b_model(capsys, residual):
    """The figures in the comment of its config."""
    auto, even = (
        json.loads(plan(capsys, f"kimi_linear_48b{residual}", *arguments, overrides=overrides))
        for arguments in [("--json", "--nproc", "48")]
        for overrides in [(), ("parallel.layout=even",)]
    )
    assert [rank["layers"] for rank in auto["ranks"]][-2:] == [[[20, 24]], [[25, 26]]]
    assert (round(slowest(auto), 2), round(slowest(even), 2)) == (1.02, 1.36)
    assert round(auto["schedules"]["1f1b"]["bubble"], 2) == 0.04
    assert round(even["schedules"]["1f1b"]["bubble"], 2) == 0.27


def test_93_layers_on_16_stages(capsys):
    overrides = ("num_layers=93", "full_attention_layers=null")
    overrides = (*(f"model.{one}" for one in overrides), "parallel.layout=auto")
    overrides += ("parallel.pipeline_model_parallel_size=16",)
    arguments = ("kimi_linear_48b_attnres", "--json", "--nproc", "1024")
    auto = json.loads(plan(capsys, *arguments, overrides=overrides))
    even = json.loads(plan(capsys, *arguments, overrides=(*overrides, "parallel.layout=even")))
    spans = [span for rank in auto["ranks"] for span in rank["layers"]]
    assert [layer for a, b in spans for layer in range(a, b + 1)] == list(range(93))
    assert slowest(auto) < 1.05 < 1.2 < slowest(even)


def test_the_schedule_of_the_config_is_the_one_planned(capsys):
    overrides = ("pipeline.schedule=gpipe",)
    report = json.loads(plan(capsys, "quickstart", "--json", overrides=overrides))
    gpipe = report["schedules"]["gpipe"]
    assert max(report["peak_blocks"]) == gpipe["peak_blocks"]
    assert max(rank["memory"]["total"] for rank in report["ranks"]) == gpipe["memory"]


OWN = "tests.own_schedules:LongWarmUp"


def longer_by(passes: int) -> tuple[str, ...]:
    return f"pipeline.schedule={OWN}", f"pipeline.schedule_options.extra={passes}"


def test_a_schedule_of_the_users_own_is_planned_beside_ours(capsys):
    report = json.loads(plan(capsys, "quickstart", "--json", overrides=longer_by(3)))
    schedules = report["schedules"]
    assert list(schedules) == ["1f1b", "gpipe", OWN]
    for what in ("peak_blocks", "activations", "memory"):
        assert schedules["1f1b"][what] < schedules[OWN][what] < schedules["gpipe"][what]
    assert max(report["peak_blocks"]) == schedules[OWN]["peak_blocks"]
    same = json.loads(plan(capsys, "quickstart", "--json", overrides=longer_by(0)))["schedules"]
    assert same[OWN] == same["1f1b"] == schedules["1f1b"]
    assert f"\n  {OWN}  " in plan(capsys, "quickstart", overrides=longer_by(0))


def test_a_schedule_that_cannot_be_run_is_named(capsys):
    told = "pipeline.schedule tests.own_schedules:Deadlock cannot be run: deadlock: rank 0 before B"
    with pytest.raises(UserError, match=told):
        plan(capsys, "quickstart", overrides=("pipeline.schedule=tests.own_schedules:Deadlock",))


def test_recomputation_trades_memory_for_flops(capsys):
    modes = [
        json.loads(plan(capsys, "quickstart", "--json", overrides=(f"train.recompute={mode}",)))
        for mode in ("none", "selective", "full")
    ]
    activations = [mode["ranks"][0]["memory"]["activations"] for mode in modes]
    flops = [mode["ranks"][0]["flops"] for mode in modes]
    assert activations == sorted(activations, reverse=True) and len(set(activations)) == 3
    assert flops == sorted(flops) and len(set(flops)) == 3


def test_one_rank_has_no_hops(capsys):
    alone = [f"parallel.{size}pipeline_model_parallel_size=1" for size in ("", "virtual_")]
    assert "Hops: none, one chunk" in plan(capsys, "quickstart", overrides=tuple(alone))


def test_picture(capsys, tmp_path):
    plan(capsys, "quickstart", "--picture", str(tmp_path / "step.svg"), "--mode", "naive")
    assert "naive: 2 ranks x 2 virtual stages" in (tmp_path / "step.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--flops-rate", "0"), "--flops-rate is 0"),
        (("--link-bandwidth", "nan"), "--link-bandwidth is nan"),
        (("--picture", "missing/folder/step.svg"), "missing/folder/step.svg"),
    ],
)
def test_bad_options_are_named(capsys, arguments, named):
    with pytest.raises(UserError, match=named):
        plan(capsys, "quickstart", *arguments)


def test_every_stage_is_planned(capsys, tmp_path):
    picture = tmp_path / "step.svg"
    text = plan(capsys, "stages", "--picture", str(picture))
    assert "stage pretrain (1 of 2)" in text and "stage anneal (2 of 2)" in text
    assert {file.name for file in tmp_path.iterdir()} == {"step-pretrain.svg", "step-anneal.svg"}
    reports = json.loads(plan(capsys, "stages", "--json"))["stages"]
    short, long = reports["pretrain"], reports["anneal"]
    assert (short["micro_batches"], long["micro_batches"]) == (8, 4)
    assert long["unit_bytes"] == 2 * short["unit_bytes"]
