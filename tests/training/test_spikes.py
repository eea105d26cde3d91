"""What counts as a loss spike, and what does not."""

from __future__ import annotations

import json
import math
import random

import pytest

from attnres_train.config.schema import TrainSection
from attnres_train.runs.progress import Progress
from attnres_train.training.spikes import KEPT_BEFORE, look

TRAIN = TrainSection(train_iters=10_000, seq_length=8, global_batch_size=1)
NARROW = TrainSection(train_iters=100, seq_length=8, global_batch_size=1, spike_window=10)


def spiking(losses, train=TRAIN, progress=None) -> list[int]:
    """The steps with which spikes begin."""
    progress, begun = progress or Progress(), []
    for loss in losses:
        progress.step += 1
        look(train, progress, loss, is_main=False)
        if progress.spikes.since == progress.step:
            begun.append(progress.step)
    return begun


def curve(steps: int, seed: int) -> list[float]:
    """A power law with noise of heavy tails (t, 5 degrees of freedom), falling faster from 4/5 of
    the steps on as with a learning rate that decays."""
    noise = random.Random(seed)
    losses = []
    for step in range(1, steps + 1):
        t = noise.gauss(0, 1) / math.sqrt(noise.gammavariate(2.5, 2) / 5)
        late = max(0.0, step / steps - 0.8)
        losses.append(1.7 + 9 * step**-0.4 - late + 0.03 * t)
    return losses


@pytest.mark.parametrize("seed", range(5))
def test_an_ordinary_run_has_none(seed):
    assert spiking(curve(4000, seed)) == []


@pytest.mark.parametrize("at", [150, 1000, 3900])
def test_a_spike_is_one_whatever_its_length(at):
    losses = curve(4000, 1)
    for later in range(20):
        losses[at + later] += 3 * 0.8**later
    assert spiking(losses) == [at + 1]


def test_nothing_is_one_before_the_window_is_full():
    losses = [5.0, 4.0] * 5
    assert spiking([*losses[:9], 50.0], NARROW) == []
    assert spiking([*losses, 50.0], NARROW) == [11]


def test_a_loss_that_stays_up_is_the_usual_after_half_a_window():
    progress = Progress()
    assert spiking([1.0] * 10 + [3.0] * 5, NARROW, progress) == [11]
    assert progress.spikes.since == 11
    assert spiking([3.0] * 10, NARROW, progress) == []
    assert progress.spikes.since == 0


def test_rounding_is_none_and_a_fall_neither():
    assert spiking([2.0] * 20 + [2.0 + 1e-6] + [0.1], NARROW) == []


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_what_is_not_finite_is_left_to_others(odd):
    progress = Progress()
    assert spiking([1.0] * 10 + [odd] * 8 + [1.0, 3.0], NARROW, progress) == [20]
    assert len(progress.spikes.recent) == 10
    json.dumps(progress.plain(), allow_nan=False)


def test_none_at_all_where_there_is_no_window():
    off = NARROW.model_copy(update={"spike_window": 0})
    assert spiking([1.0] * 50 + [99.0], off) == []


def test_a_resumed_run_decides_alike_and_remembers_the_last():
    losses = curve(400, 3)
    for at in (200, 260, 330):
        losses[at] += 2
    whole, first = Progress(), Progress()
    begun = spiking(losses, TRAIN, whole)
    before = spiking(losses[:261], TRAIN, first)
    second = Progress.of(json.loads(json.dumps(first.plain())))
    assert before + spiking(losses[261:], TRAIN, second) == begun == [201, 261, 331]
    assert second == whole
    assert whole.spikes.before == begun[-KEPT_BEFORE:]
    assert whole.spikes.count == 3


def test_checkpoints_of_before_have_none():
    assert Progress.of({"step": 3, "samples": 24, "tokens": 768}) == Progress(3, 24, 768)
