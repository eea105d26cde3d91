from __future__ import annotations

import argparse
import json

import pytest

from attnres_train.config import load_config
from attnres_train.errors import UserError
from attnres_train.tools.plan import run
from attnres_train.tools.plan_options import add_arguments


def plan(capsys, config: str, *arguments: str, overrides: tuple[str, ...] = ()) -> str:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    code = run(load_config(f"configs/{config}.yaml", list(overrides)), parser.parse_args(arguments))
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
    assert report["schedules"]["gpipe"]["peak_blocks"] > report["schedules"]["1f1b"]["peak_blocks"]
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
    text = plan(capsys, "kimi_linear_48b_attnres", "--nproc", "576")
    for words in (
        "9 pipeline ranks x 3 virtual stages, 32 micro-batches per step",
        "One unit (a block or partial of a micro-batch) is 18.9 MB.",
        "18 -> 19  0 -> 1   4-6      -     partial  75.5 MB",
        "full history on every hop                   152",
        "exact: this plan                             83",
        "lower bound                                  83",
    ):
        assert words in text


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
