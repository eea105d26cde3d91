"""The search: what it proposes can be run and fits, is the same every time, and is told clearly."""

from __future__ import annotations

import json
import re
import time

import pytest

from attnres_train.__main__ import main
from attnres_train.config import check_config, load_config
from attnres_train.errors import UserError
from attnres_train.planning.advice import as_report, as_text, as_yaml
from attnres_train.planning.devices import DEVICES, Device, find_device
from attnres_train.planning.grids import AXES, Grid, Space, divisors, powers
from attnres_train.planning.search import Found, search

TIGHT = find_device("h100", ["memory=2e8"])
SMALL = ["train.seq_length=4096", "train.global_batch_size=64"]


@pytest.fixture(scope="module")
def small():
    return load_config("configs/quickstart.yaml", SMALL)


@pytest.fixture(scope="module")
def found(small) -> Found:
    return search(small, 4, TIGHT)


def test_every_grid_passes_the_checks(small):
    """Those that the search may go through, one of every grid of processes and layout."""
    space = Space(small, 8, 8)
    grids = [by_size[-1][-1] for by_size in space.settings()]
    assert len(grids) > 20
    for grid in grids:
        check_config(grid.of(small), 8, files=False)
        assert grid.stage * grid.pipeline == 8
    assert len(set(grids)) == len(grids)


def test_what_the_checks_refuse_alone_is_not_gone_through(small):
    assert {grid.tensor for grid in all_of(Space(small, 8, 8))} >= {1, 2}
    uneven = small.model_copy(deep=True)
    uneven.model.moe.num_experts = 6
    space = Space(uneven, 8, 8)
    assert {grid.expert for grid in all_of(space)} == {1, 2}
    odd = load_config("configs/quickstart.yaml", [*SMALL[:1], "train.global_batch_size=6"])
    space = Space(odd, 8, 8)
    assert all(6 % (grid.data * grid.micro_batch) == 0 for grid in all_of(space))
    assert "is not divisible by 8 replicas" in space.refused.examples["global batch"]


def all_of(space: Space) -> list[Grid]:
    return [grid for setting in space.settings() for modes in setting for grid in modes]


def test_the_best_is_the_best_that_fits(found):
    """Against every grid that there is, each simulated."""
    estimator, usable = found.estimator, found.estimator.device.usable_memory
    space = Space(estimator.config, 4, 8)
    fitting = [g for g in all_of(space) if estimator.memory(g)["total"] <= usable]
    assert 0 < len(fitting) < found.considered
    fastest = min(estimator.simulated(grid).seconds for grid in fitting)
    assert found.steps[found.best[0]].seconds <= 1.02 * fastest
    seconds = [found.steps[grid].seconds for grid in found.best]
    assert seconds == sorted(seconds)
    assert len({grid.sizes for grid in found.best}) == len(found.best) > 1
    assert all(estimator.memory(grid)["total"] <= usable for grid in found.best)


def test_the_same_every_time(small, found):
    again = search(small, 4, TIGHT)
    assert as_report(again) == as_report(found)


def test_losers_are_told_why(found):
    report = as_report(found)
    assert {one["key"] for one in report["losers"]} <= set(AXES.values())
    for one in report["losers"]:
        if one["slower"] is None:
            assert "GB too much" in one["why"]
            assert one["memory"] > found.estimator.device.usable_memory
        else:
            assert one["why"].startswith("more of ") and one["slower"] >= 0
        own = dict(zip(AXES.values(), AXES, strict=True))[one["key"]]
        assert one["value"] != getattr(found.best[0], own)
    assert any(one["slower"] is None for one in report["losers"])


def test_the_report_is_json_and_adds_up(found):
    report = json.loads(json.dumps(as_report(found)))
    assert list(report) == [
        *("run", "gpus", "device", "considered", "fitting", "best", "losers", "refused", "config"),
    ]
    for one in report["best"]:
        assert sum(one["parts"].values()) == pytest.approx(one["seconds"])
        assert sum(one["causes"].values()) == pytest.approx(1)
        memory = dict(one["memory"])
        assert memory.pop("total") == pytest.approx(sum(memory.values()))
        rate = 64 * 4096 / one["seconds"] / 4
        assert one["tokens_per_second_per_gpu"] == pytest.approx(rate)
        assert 0 < one["mfu"] < 1


def test_it_fits_on_a_screen(found):
    text = as_text(as_report(found), "")
    assert len(text.splitlines()) < 60
    assert max(map(len, text.splitlines())) <= 180
    assert "needs 0." in text and "of 0.2 GB" in text
    assert "All figures are predictions" in text


def test_the_yaml_is_the_config_on_that_grid(tmp_path, small, found):
    given = {"train": {"seq_length": 4096, "global_batch_size": 64}}
    file = tmp_path / "best.yaml"
    file.write_text(as_yaml(found, "configs/quickstart.yaml", tmp_path, given))
    assert load_config(file) == found.best[0].of(small)


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    file = tmp_path / "best.yaml"
    words = ["plan", "quickstart", "--gpus", "2", "--device", "cpu", "--json", "--yaml", str(file)]
    assert main([*words, "train.global_batch_size=32", "data.corpus.0.weight=2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert file.read_text() == report["yaml"]
    config = load_config(file)
    check_config(config, 2)
    assert config.train.global_batch_size == 32 and config.data.corpus[0].weight == 2
    assert config.parallel.model_dump().items() >= report["config"]["parallel"].items()


def test_bigger_links_are_never_slower(small, found):
    fast = find_device("h100", ["memory=2e8", "network_link=4e11", "node_link=9e11"])
    better = search(small, 4, fast, shown=1)
    assert better.steps[better.best[0]].seconds <= found.steps[found.best[0]].seconds


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpus", "0"], "--gpus is 0: it must be at least 1"),
        (["--gpus", "8", "--device", "h1000"], "h1000 is not known: take one of a100, b200, cpu"),
        (["--gpus", "8", "--assume", "matmull=1"], "nothing is called so; did you mean matmul?"),
        (["--gpus", "8", "--assume", "matmul=1.5"], "it must be above 0 and at most 1"),
        (["--gpus", "8", "--assume", "memory=-1"], "it must be finite and above 0"),
        (["--gpus", "8", "--assume", "node_size=2.5"], "expected a whole number"),
        (["--gpus", "8", "--assume", "memory=lots"], "expected a number"),
        (["--gpus", "8", "--assume", "missing.yaml"], "there is no file missing.yaml"),
        (["--gpus", "8", "--nproc", "2"], "--nproc is of one layout"),
        (["--gpus", "8", "--yaml", "configs/quickstart.yaml"], "is the config itself"),
        (["--device", "h100"], "--device is of a search: add --gpus N"),
        (["--gpus", "11"], "no grid of so many has replicas .* take 10 or 12"),
        (["--gpus", "2", "--assume", "memory=1e6"], "nothing fits 2 x h100.*GB too much"),
        (["--gpus", "2", "model.moe.num_experts=1"], "a token cannot use more experts"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_what_makes_no_sense_is_told(capsys, words, told):
    assert main(["plan", "configs/quickstart.yaml", *words]) == 2
    assert re.search(told, capsys.readouterr().err)


def test_devices_are_whole():
    for name, device in DEVICES.items():
        assert isinstance(device, Device) and device.name == name
        assert device.usable_memory < device.memory
        assert device.network_link <= device.node_link < device.memory_bandwidth
    assert divisors(12) == [1, 2, 3, 4, 6, 12] and powers(9) == [1, 2, 4, 8]


def test_assumptions_come_from_files_too(tmp_path):
    file = tmp_path / "measured.yaml"
    file.write_text("matmul: 0.5\nnode_size: 72\n")
    device = find_device("b200", [str(file), "matmul=0.55"])
    assert (device.matmul, device.node_size, device.name) == (0.55, 72, "b200")


@pytest.mark.nightly
def test_the_48b_is_searched_in_seconds():
    config = load_config("configs/kimi_linear_48b_attnres.yaml")
    start = time.process_time()
    found = search(config, 1024, DEVICES["h200"], shown=1)
    assert found.considered > 1000
    assert time.process_time() - start < 30


def test_an_unusable_folder_is_told(capsys):
    words = ["plan", "configs/quickstart.yaml", "--gpus", "1", "--yaml", "missing/folder/x.yaml"]
    assert main(words) == 2
    assert "--yaml missing/folder/x.yaml" in capsys.readouterr().err
    with pytest.raises(UserError):
        search(load_config("configs/quickstart.yaml"), -3, DEVICES["cpu"])
