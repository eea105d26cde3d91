"""What a grid takes, against the plan of a layout, the transport plan and public figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnres_train.config import check_config, load_config
from attnres_train.config.stages import stage_configs
from attnres_train.pipeline.plan.schedule import one_f_one_b
from attnres_train.pipeline.plan.simulate import Costs, simulate
from attnres_train.planning.balance import idle_share, imbalance
from attnres_train.planning.devices import DEVICES, find_device
from attnres_train.planning.estimate import Estimator
from attnres_train.planning.experts import exchange_bytes
from attnres_train.planning.grids import ALONE, Grid, grid_of
from attnres_train.planning.machine import Machine
from attnres_train.planning.planner import Planner
from attnres_train.planning.search import search
from attnres_train.planning.text import as_text

CONFIGS = Path(__file__).parents[2] / "configs"
H100 = DEVICES["h100"]
FIT = {
    "kimi_linear_48b": (48, "h100"),
    "kimi_linear_48b_attnres": (48, "h100"),
    "kimi_linear_48b_stages": (48, "h100"),
    **{f"kimi_linear_48b_attnres_{gpus}": (gpus, "h100") for gpus in (64, 256, 1024)},
    **{f"table2_{size}": (8, "h100") for size in ("194m", "241m", "296m", "436m", "528m")},
    "quickstart": (2, "cpu"),
    "stages": (1, "cpu"),
    **{f"compare_{kind}": (2, "cpu") for kind in ("block", "full", "standard")},
}
"""Every shipped configuration -> devices that it says it is for (else: laptop's cores)."""


@pytest.fixture(scope="module")
def quickstart() -> Estimator:
    return Estimator(load_config("configs/quickstart.yaml"), H100)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_shipped_configs_fit_their_device(name):
    gpus, device = FIT[name]
    config = load_config(CONFIGS / f"{name}.yaml")
    check_config(config, gpus, files=False)
    for stage in stage_configs(config):
        estimator = Estimator(stage, find_device(device))
        memory = estimator.memory(grid_of(stage, gpus))
        assert memory["total"] <= estimator.device.usable_memory


GRIDS = [
    Grid(1, 1, 1, 1, 2, 2, "even", 2, "none"),
    Grid(1, 1, 1, 1, 2, 1, "auto", 1, "full"),
    Grid(1, 1, 2, 2, 4, 2, "even", 1, "selective"),
    Grid(1, 1, 4, 4, 1, 1, "even", 1, "none"),
    Grid(2, 2, 4, 1, 2, 2, "even", 2, "full"),
]


@pytest.mark.parametrize("precision", ["fp32", "bf16_params"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_memory_is_that_of_the_plan(grid, precision):
    """Of the fullest rank, part by part where one rank is all; owners differ by a matrix."""
    config = grid.of(load_config("configs/quickstart.yaml", [f"train.precision={precision}"]))
    planner = Planner(config, Machine(), grid.stage * grid.pipeline)
    ranks = [rank["memory"] for rank in planner.report()["ranks"]]
    ours = Estimator(config, H100).memory(grid)
    for part in ("parameters", "gradients"):
        assert ours[part] in [rank[part] for rank in ranks]
    extra = ours["buffers"] + ours["update"]
    if grid.tensor > 1:
        return  # what sublayers gather is in the estimate alone
    most = max(rank["total"] for rank in ranks)
    assert ours["total"] - extra == pytest.approx(most, rel=0.15)
    if grid.stage == 1:  # nothing is shared out
        assert ours["total"] - extra in [pytest.approx(rank["total"]) for rank in ranks]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_bytes_are_those_of_the_transport_plan_and_of_the_exchange(quickstart, grid):
    config = grid.of(quickstart.config)
    sent, count = quickstart.sent(grid), quickstart.micro_batches(grid)
    plan = quickstart.order_of(grid).plan
    unit = grid.micro_batch * 256 * 128 * 4 // (grid.tensor * grid.context)
    by_rank = [0] * grid.pipeline
    for hop in plan.hops:  # forward from its source; its gradients from its destination
        by_rank[hop.src_rank] += hop.units * unit
        by_rank[hop.dst_rank] += hop.units * unit
    assert sent["pipeline"] == count * max(by_rank)
    one = exchange_bytes(config, 4)
    layers = [7] if grid.pipeline == 1 else None
    if grid.expert > 1 and layers:
        assert sent["expert"] == pytest.approx(7 * count * (one.forward + one.backward))
    assert ("expert" in sent) == (grid.expert > 1)


def test_updates_send_every_parameter_once_to_its_replicas(quickstart):
    """A reduction to owners passes (n - 1) / n of the gradients through every link of n replicas;
    experts have fewer."""
    alone = quickstart.work.held(1, 1)
    total, experts = alone["elements"].sum(), alone["experts"].sum()
    grid = Grid(1, 1, 2, 8, 1, 1, "even", 1, "none")
    expected = (total - experts) * 7 / 8 + experts / 2 * 3 / 4
    assert quickstart.sent(grid)["gradients"] == pytest.approx(4 * expected)
    assert quickstart.sent(grid)["parameters"] == pytest.approx(4 * expected)
    config = load_config("configs/quickstart.yaml", ["optimizer.sharded=false"])
    unsharded = Estimator(config, H100).sent(grid)
    assert unsharded["gradients"] == pytest.approx(8 * expected)
    assert unsharded["parameters"] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"tensor": 2, "data": 2},
        {"context": 2, "data": 2},
        {"expert": 4},
        {"pipeline": 2, "data": 2},
        {"micro_batch": 1},
        {"recompute": "selective"},
        {"recompute": "full"},
    ],
    ids=str,
)
def test_memory_falls_with_more_sharing(change):
    large = [
        "train.seq_length=4096",
        "model.moe.num_experts=64",
        "model.moe.intermediate_size=4096",
    ]
    config = load_config("configs/quickstart.yaml", large)
    estimator = Estimator(config, H100)
    grid = Grid(1, 1, 1, 4, 1, 1, "even", 2, "none")
    assert estimator.memory(grid._replace(**change))["total"] < estimator.memory(grid)["total"]


def test_gpipe_keeps_every_micro_batch():
    config = load_config("configs/quickstart.yaml", ["pipeline.schedule=gpipe"])
    grid = Grid(1, 1, 1, 1, 2, 1, "even", 1, "none")
    few, many = (
        Estimator(
            config.model_copy(
                update={"train": config.train.model_copy(update={"global_batch_size": samples})}
            ),
            H100,
        ).memory(grid)
        for samples in (8, 32)
    )
    assert many["block_store"] == 4 * few["block_store"]
    assert many["activations"] > 3.9 * few["activations"]


def test_more_replicas_keep_less_state(quickstart):
    few, many = (quickstart.memory(ALONE._replace(data=data))["optimizer"] for data in (1, 8))
    assert many == pytest.approx(few / 8)


SLOWER = ["matmul", "experts", "attention", "recurrence", "memory_share", "node_share", "overlap"]
SLOWER += ["network_share", "memory_bandwidth", "node_link", "network_link", "peak_flops"]


@pytest.mark.parametrize("key", SLOWER)
def test_more_of_anything_is_never_slower(key):
    config = load_config("configs/quickstart.yaml", ["train.precision=bf16_params"])
    grid = Grid(2, 2, 4, 4, 2, 2, "even", 1, "full")
    half = find_device("h100", [f"{key}={getattr(H100, key) / 2}"])
    slow, fast = (Estimator(config, device).simulated(grid).seconds for device in (half, H100))
    assert fast <= slow


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.pipeline > 1], ids=str)
def test_a_long_step_takes_as_long_as_if_all_of_it_were_simulated(grid):
    config = load_config("configs/quickstart.yaml", ["train.global_batch_size=128"])
    estimator = Estimator(config, H100)
    count = estimator.micro_batches(grid)
    assert count > 4 * grid.pipeline
    step = estimator.simulated(grid)
    assert sum(step.parts.values()) == pytest.approx(step.seconds)
    once = sum(step.parts[part] for part in ("gradients", "optimizer", "parameters"))
    forward, backward = (
        [float(one.sum(-1)[list(layers)].sum()) for layers in layers_of(estimator, grid)]
        for one in estimator.work.times(grid)
    )
    plan = estimator.order_of(grid).plan
    schedule = one_f_one_b(grid.pipeline, grid.virtual, count)
    unit = estimator.unit_bytes(grid) / estimator.links.hop(grid)
    whole = simulate(plan, schedule, Costs(forward, backward, unit), "eager", record=False)
    assert step.seconds - once == pytest.approx(whole.seconds, rel=1e-3)


def layers_of(estimator: Estimator, grid: Grid) -> list[range]:
    layout = estimator.order_of(grid).plan.layout
    return [layout.layers(chunk) for chunk in range(layout.num_chunks)]


PIPELINE = [
    "parallel.pipeline_model_parallel_size=4",
    "parallel.virtual_pipeline_model_parallel_size=2",
    "parallel.expert_model_parallel_size=1",
    "train.micro_batch_size=1",
]


def test_idle_stages_are_told_with_what_would_be_better():
    config = load_config("configs/table2_194m.yaml", PIPELINE)
    told = Planner(config, Machine()).report()
    assert idle_share(config) == pytest.approx(told["schedules"]["1f1b"]["bubble"], abs=1e-3)
    assert told["imbalance"] == imbalance(config)
    best = "parallel.layout=auto parallel.virtual_pipeline_model_parallel_size=1"
    own, named = told["imbalance"].split("; ")
    assert own == "57% of a step (by layout and schedule alone)"
    share, words = named.split(" or ")[0].split(" with ")
    assert words == best
    better = load_config("configs/table2_194m.yaml", [*PIPELINE, *best.split()])
    assert f"{idle_share(better):.0%}" == share
    assert "Stages are idle for 57%" in as_text(told)


def test_balanced_stages_are_not_told():
    assert imbalance(load_config("configs/kimi_linear_48b.yaml")) is None
    assert imbalance(load_config("configs/table2_528m.yaml")) is None


QWEN = [
    "model.hidden_size=2048",
    "model.num_layers=48",
    "model.vocab_size=151936",
    "model.full_attention_layers=null",
    "model.full_attention_interval=1",
    "model.mla.kv_lora_rank=208",
    "model.mla.qk_rope_head_dim=0",
    "model.moe.num_experts=128",
    "model.moe.num_shared_experts=0",
    "model.moe.intermediate_size=768",
    "model.moe.first_dense_layers=0",
    "optimizer.kind=adamw",
    "train.global_batch_size=512",
]
"""As many parameters and FLOPs as Qwen3-30B-A3B has: its attention's are MLA's."""


@pytest.mark.nightly
def test_a_public_figure_is_met_within_a_factor():
    """Qwen3-30B-A3B in bf16 on H100s: 12,040 tokens/s per GPU, 28 % MFU."""
    config = load_config("configs/kimi_linear_48b.yaml", QWEN)
    found = search(config, 16, H100, shown=1)
    step = found.steps[found.best[0]]
    rate = found.estimator.tokens_per_step / step.seconds / 16
    assert 12_040 / 1.5 < rate < 12_040 * 1.5
    assert 0.28 / 1.5 < found.estimator.mfu(found.best[0], step.seconds) < 0.28 * 1.5
