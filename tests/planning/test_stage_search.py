"""The search for a run in stages: one grid for all of them, the best there is, told clearly."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from attnres_train.__main__ import main
from attnres_train.config import check_config, load_config
from attnres_train.config.stages import stage_configs
from attnres_train.config.tree import read_tree
from attnres_train.errors import UserError
from attnres_train.planning.devices import find_device
from attnres_train.planning.estimate import Estimator
from attnres_train.planning.grids import Space
from attnres_train.planning.search import search
from attnres_train.planning.stage_advice import as_report, as_text, as_yaml
from attnres_train.planning.stage_search import FoundStages, search_stages

WORDS = [
    "stages.0.train.global_batch_size=64",
    "stages.1.train.seq_length=16384",
    "stages.1.train.train_iters=7",
]
GPUS = 2
DEVICE = find_device("h100", ["memory=4e8"])


@pytest.fixture(scope="module")
def config():
    """Short samples, and then so long ones that few grids have room for them."""
    return load_config("configs/stages.yaml", WORDS)


@pytest.fixture(scope="module")
def found(config) -> FoundStages:
    return search_stages(config, GPUS, DEVICE)


def test_one_grid_fits_all_stages_and_passes_the_checks(config, found):
    for way in zip(*(stage.best for stage in found.stages), strict=True):
        assert len({grid.place for grid in way}) == 1
        on_grid = way[0].of(config)
        for stage, found_stage, grid in zip(stage_configs(on_grid), found.stages, way, strict=True):
            check_config(grid.of(stage.model_copy(update={"stages": []})), GPUS, files=False)
            memory = found_stage.estimator.memory(grid)["total"]
            assert memory <= DEVICE.usable_memory


def test_no_other_grid_takes_less_time(config, found):
    """Of all that there are, each stage with the best of its settings, simulated."""
    totals: dict = {}
    for stage in stage_configs(config):
        alone = stage.model_copy(update={"stages": []})
        estimator, fastest = Estimator(alone, DEVICE), {}
        for setting in Space(alone, GPUS, DEVICE.node_size).settings():
            for grid in (grid for modes in setting for grid in modes):
                if estimator.memory(grid)["total"] <= DEVICE.usable_memory:
                    seconds = stage.train.train_iters * estimator.simulated(grid).seconds
                    fastest[grid.place] = min(seconds, fastest.get(grid.place, seconds))
        known = totals or dict.fromkeys(fastest, 0.0)
        totals = {place: known[place] + fastest[place] for place in known.keys() & fastest}
    assert found.seconds(0) <= 1.02 * min(totals.values())
    seconds = [found.seconds(number) for number in range(len(found.stages[0].best))]
    assert seconds == sorted(seconds) and len(seconds) > 1


def test_it_is_not_the_first_stages_grid(config, found):
    """The fastest for the first has no room for the second."""
    first, second = (one.model_copy(update={"stages": []}) for one in stage_configs(config))
    fastest = search(first, GPUS, DEVICE, shown=1).best[0]
    assert fastest == found.alone[0] and fastest.place != found.stages[0].best[0].place
    with_batch_one = fastest._replace(micro_batch=1, recompute="full")
    assert Estimator(second, DEVICE).memory(with_batch_one)["total"] > DEVICE.usable_memory


def test_the_report_adds_up_and_tells_every_stage(found):
    report = json.loads(json.dumps(as_report(found)))
    for way in report["best"]:
        stages = way["stages"].values()
        total = sum(one["steps"] * one["seconds"] for one in stages)
        assert way["seconds"] == pytest.approx(total)
        assert sum(one["share"] for one in stages) == pytest.approx(1)
    text = as_text(report, "")
    for name, alone in report["alone"].items():
        assert re.search(rf"^  {name} .* needs 0\.\d of 0\.4 GB", text, re.M)
        assert alone["seconds"] <= report["best"][0]["stages"][name]["seconds"]
    assert re.search(r"pretrain .*-\d+%: ", text), "what it would be faster on by itself"


def test_the_yaml_is_the_run_on_that_grid(tmp_path, config, found):
    file = tmp_path / "best.yaml"
    given = {"run": {"name": "mine"}, "stages": read_tree(Path("configs/stages.yaml"))}
    given["stages"] = given["stages"].values["stages"]
    file.write_text(as_yaml(found, "configs/stages.yaml", tmp_path, given))
    loaded = load_config(file)
    assert loaded.run.name == "mine"
    assert [stage.train.train_iters for stage in loaded.stages] == [40, 20], "as they are written"
    for stage, search_of_it in zip(stage_configs(loaded), found.stages, strict=True):
        grid = search_of_it.best[0]
        assert (stage.train.micro_batch_size, stage.train.recompute) == grid[-2:]
        assert stage.parallel.pipeline_model_parallel_size == grid.pipeline
        assert stage.parallel.context_parallel_size == grid.context


def test_a_stage_that_fits_nowhere_is_named(config):
    with pytest.raises(UserError, match=r"stage anneal \(2 of 2\): nothing fits 1 x h100"):
        search_stages(config, 1, find_device("h100", ["memory=2e8"]))
    with pytest.raises(UserError, match="--gpus is 0"):
        search_stages(config, 0, DEVICE)


def test_the_command_plans_every_stage(tmp_path, capsys):
    file = tmp_path / "best.yaml"
    words = ["plan", "stages", "--gpus", "2", "--device", "cpu", "--json", "--yaml", str(file)]
    assert main([*words, "stages.1.train.train_iters=30"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["best"][0]["stages"]) == ["pretrain", "anneal"]
    assert report["best"][0]["stages"]["anneal"]["steps"] == 30
    loaded = load_config(file)
    check_config(loaded, 2)
    assert loaded.stages[1].train.train_iters == 30
    for number, stage in report["config"]["stages"].items():
        train = loaded.stages[int(number)].train.model_dump()
        assert train.items() >= stage["train"].items()
