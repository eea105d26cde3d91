"""Observations in the run folder, and the pictures made of them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from attnres_train.config.model_schema import ModelConfig
from attnres_train.observe import pictures
from attnres_train.observe.curves import TensorBoard
from attnres_train.observe.observed import (
    Arrays,
    Kept,
    arrays_of,
    observed_steps,
    read_observation,
    superfluous,
)
from tests.observe.helpers import context

MODEL = {"hidden_size": 8, "num_layers": 2, "vocab_size": 8}
BLOCKS = {"kind": "block", "block_size": 3}
NAMES = {"depth_attention", "magnitudes", "query_norms", "expert_load", "block_store"}


def model(**residual) -> ModelConfig:
    return ModelConfig.model_validate(MODEL | {"residual": residual or BLOCKS})


def totals(**more) -> dict[str, np.ndarray]:
    """Of a model of four sublayers in blocks of three: the embedding, and two more."""
    found = {f"depth_weight/{i}": np.array([3.0, 1.0, 2.5, 0.5, 4]) for i in (2, 3, 4)}
    found["depth_weight/1"] = np.array([4.0, 4.0, 4])
    found["depth_weight/5"] = np.array([2.0, 1, 1, 1.5, 0.5, 0.5, 4])
    found |= {f"stream/{i}": np.array([4.0 * i, 1]) for i in range(5)}
    found |= {
        f"{what}/{i}": np.array([9.0, 4])
        for i in range(1, 5)
        for what in ("output", "output_gradient")
    }
    found |= {f"gradient/{i}": np.array(16.0) for i in range(6)}
    found |= {f"query/{i}": np.array(25.0) for i in range(1, 6)}
    return found | {"expert_load/1": np.array([6.0, 2, 0, 0]), "store/0": np.array([3, 96])} | more


def test_sums_become_means_spreads_and_roots():
    arrays = arrays_of(model(), totals())
    assert arrays["depth_weight_mean"].shape == (5, 3)
    np.testing.assert_allclose(arrays["depth_weight_mean"][1], [0.75, 0.25, np.nan])
    # 2.5 / 4 - 0.75^2 and 0.5 / 4 - 0.25^2
    np.testing.assert_allclose(arrays["depth_weight_std"][1], [0.25, 0.25, np.nan])
    assert arrays["depth_weight_std"][0, 0] == 0
    assert arrays["output_rms"].tolist() == [1.5] * 4
    assert arrays["stream_rms"].tolist() == [0, 2, pytest.approx(8**0.5), pytest.approx(12**0.5), 4]
    assert arrays["block_rms"].tolist() == [0, pytest.approx(12**0.5), 4]
    assert arrays["gradient_norm"].tolist() == [4] * 6
    assert arrays["query_norm"].tolist() == [5] * 5
    assert arrays["expert_load"].tolist() == [[3, 1, 0, 0]]
    assert arrays["expert_violation"].tolist() == [2]
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(4)
    assert arrays["expert_entropy"].tolist() == [pytest.approx(entropy, rel=1e-6)]
    assert (arrays["store_blocks"], arrays["store_bytes"]) == ([3], [96])
    assert all(array.dtype == np.float32 for array in arrays.values())


def test_what_is_not_there_is_left_out():
    only = {f"stream/{i}": np.array([1.0, 1]) for i in range(5)}
    assert arrays_of(model(kind="standard"), only).keys() == {"stream_rms"}


def kept(folder: Path, **observe) -> Kept:
    run = context(folder)
    run.config.observe = run.config.observe.model_copy(update=observe)
    return Kept(run.config.observe, "observe", run)


def fill(folder: Path, *steps: int) -> Arrays:
    observer, arrays = kept(folder), arrays_of(model(), totals())
    observer.on_start(0)
    for step in steps:
        observer.on_observation(step, arrays)
    return arrays


def test_written_and_read_again(tmp_path):
    arrays = fill(tmp_path, 100, 200)
    assert observed_steps(tmp_path) == [100, 200]
    found = read_observation(tmp_path)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    assert read_observation(tmp_path, 150) == {}
    assert [path.suffix for path in (tmp_path / "observed").iterdir()] == [".npz", ".npz"]


def test_steps_that_come_again_are_dropped(tmp_path):
    fill(tmp_path, 1, 2, 3)
    observer = kept(tmp_path)
    observer.on_start(2)
    assert observed_steps(tmp_path) == [1, 2]
    observer.on_roll_back(1)
    assert observed_steps(tmp_path) == [1]


def test_those_that_are_kept_are_spread_over_the_run(tmp_path):
    observer, arrays = kept(tmp_path, keep=4), arrays_of(model(), totals())
    observer.on_start(0)
    for step in range(1, 41):
        observer.on_observation(step, arrays)
    steps = observed_steps(tmp_path)
    assert len(steps) == 4 and (steps[0], steps[-1]) == (1, 40)
    assert min(np.diff(steps)) >= 5
    assert superfluous([1, 2, 3], 5) == []


def test_a_disk_that_is_full_costs_no_run(tmp_path, capsys):
    observer = kept(tmp_path)
    observer.on_start(0)
    (tmp_path / "observed").write_text("no folder")
    for step in (1, 2):
        observer.on_observation(step, {})
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_pictures_of_everything_there_is(tmp_path):
    fill(tmp_path, *range(10, 90, 10))
    found = pictures.pictures(tmp_path)
    assert found.keys() == NAMES
    assert all(isinstance(figure, Figure) for figure in found.values())
    paths = pictures.save(found, tmp_path / "png")
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    heat, spread, *_ = found["depth_attention"].axes
    np.testing.assert_allclose(
        np.ma.filled(heat.images[0].get_array(), np.nan)[1, :2], [0.75, 0.25]
    )
    assert [text.get_text() for text in spread.texts][:3] == [".00", ".25", ".25"]
    (lines,) = found["query_norms"].axes
    labels = [line.get_label() for line in lines.lines]
    assert labels[0] == "step 10" and labels[-1] == "step 80" and len(labels) == 4


def test_pictures_of_a_step_and_of_none(tmp_path):
    assert pictures.pictures(tmp_path) == {}
    fill(tmp_path, 10, 20)
    assert pictures.pictures(tmp_path, 15) == {}
    assert "step 10" in pictures.pictures(tmp_path, 10)["depth_attention"].get_suptitle()


def test_a_standard_residual_has_magnitudes_alone(tmp_path):
    observer = kept(tmp_path)
    observer.on_start(0)
    only = {f"{what}/{i}": np.array([1.0, 1]) for i in range(1, 5) for what in ("output", "stream")}
    observer.on_observation(5, arrays_of(model(kind="standard"), only))
    assert pictures.pictures(tmp_path).keys() == {"magnitudes"}


def test_no_pictures_without_matplotlib(tmp_path, monkeypatch):
    fill(tmp_path, 10)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert pictures.pictures(tmp_path) == {}


def test_tensorboard_shows_them_now_and_then(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arrays = fill(tmp_path, 10, 20)
    board = TensorBoard(context(tmp_path).config.log, "log", context(tmp_path))
    board.on_start(0)
    for step in (10, 20):  # the second one comes too soon after the first
        board.on_observation(step, arrays)
    board.on_end()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["images"]) == {f"observed/{name}" for name in NAMES}
    assert [event.step for event in events.Images("observed/magnitudes")] == [10]
