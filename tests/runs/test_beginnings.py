"""Where a run begins: `checkpoint.resume` with a path or ``never``, `checkpoint.load`; and what the
run folder keeps of every start."""

from __future__ import annotations

import json
import shutil

import pytest

from attnres_train.checkpoint import folders
from attnres_train.checkpoint.manifest import read_manifest
from attnres_train.config import load_config
from attnres_train.config.loader import as_yaml
from tests.parity.pool import RankFailedError
from tests.tiny import STEPS, TOKENS, TinyRuns, column, records, whole

HALF = STEPS // 2
STOP = f"train.stop_after={HALF}"


@pytest.fixture
def runs(tmp_path, pool) -> TinyRuns:
    """With a corpus of their own."""
    return TinyRuns(tmp_path, pool)


class TestBeginnings:
    @pytest.mark.nightly
    def test_a_path_is_where_a_run_begins_and_not_where_it_goes_back_to(self, tiny):
        first = tiny.train("first", STOP)
        start = [f"checkpoint.resume={first}", "train.train_iters=9", "checkpoint.save_interval=1"]
        second = tiny.train("second", *start, "train.stop_after=5")
        assert column(second, "step") == [4, 5]
        again = tiny.screen("second", *start, "train.stop_after=7")
        assert f"resumed from {second / 'checkpoints' / folders.step_name(5)}\n" in again
        assert column(second, "step") == [4, 5, 6, 7]
        assert len(list((first / "checkpoints").iterdir())) == 1
        shutil.rmtree(first)  # not needed any more
        assert "saved" in tiny.screen("second", *start, "train.stop_after=8")

    def test_never_moves_what_is_there_aside_once(self, tiny):
        never = "checkpoint.resume=never"
        run = tiny.train("renewed", "optimizer.lr=0.02", STOP)
        old = whole(run / "checkpoints"), records(run)
        screen = tiny.screen("renewed", never, "train.stop_after=1")
        aside = run / "before-1"
        assert f"the run that was in {run} is in {aside} now\n" in screen
        assert column(run, "step") == [1]
        files = whole(aside / "checkpoints")
        assert {name.replace("before-1/", ""): file for name, file in files.items()} == old[0]
        assert records(aside) == old[1]
        again = tiny.screen("renewed", never, "train.stop_after=2")
        assert f"resumed from {run / 'checkpoints' / folders.step_name(1)}\n" in again
        assert column(run, "step") == [1, 2] and not (run / "before-2").exists()

    def test_a_crash_before_the_first_save_mixes_nothing(self, tiny):
        run = tiny.train("crashed", "optimizer.lr=0.02", STOP)
        crash = "log.observers=[tests.own_observers:Crash]"
        with pytest.raises(RankFailedError, match="crashed as it was told to"):
            tiny.train("crashed", "checkpoint.resume=never", crash)
        assert column(run, "lr") == [0.01]
        tiny.train("crashed", STOP)
        assert column(run, "step") == [1, 2, 3]
        assert set(column(run, "lr")) == {0.01}
        assert set(column(run / "before-1", "lr")) == {0.02}
        assert read_manifest(folders.find_latest(run / "checkpoints")).serial == 1

    @pytest.mark.nightly
    def test_back_to_an_earlier_step_of_its_own(self, tiny):
        every = ["checkpoint.save_interval=1", "checkpoint.keep_last=9", "train.train_iters=9"]
        run = tiny.train("back", *every, "train.stop_after=4")
        losses = column(run, "loss")
        back = f"checkpoint.resume={run / 'checkpoints' / folders.step_name(2)}"
        crash = "log.observers=[tests.own_observers:Crash]"
        with pytest.raises(RankFailedError, match="crashed as it was told to"):
            tiny.train(
                "back", *every, back, crash, "optimizer.lr=0.5", "checkpoint.save_interval=0"
            )
        # The step folder has moved: the same command finds it where it is now.
        tiny.train("back", *every, back, "train.stop_after=4")
        assert column(run, "loss") == losses
        assert column(run / "before-1", "loss") == losses
        configs = [load_config(path) for path in sorted((run / "history").iterdir())]
        assert [config.optimizer.lr for config in configs] == [0.01, 0.01]
        assert len(list((run / "before-1" / "checkpoints").iterdir())) == 4


class TestWeightsOfAnotherRun:
    def test_all_else_starts_anew(self, tiny):
        first = tiny.train("taught", STOP)
        load = [f"checkpoint.load={first}", "run.seed=7"]
        run = tiny.train("pupil", *load, "train.stop_after=2")
        assert f"weights of {first}" in tiny.screen("pupil", *load, "train.stop_after=2")
        assert column(run, "step") == [1, 2] and column(run, "tokens") == [TOKENS, 2 * TOKENS]
        fresh = tiny.train("untaught", "run.seed=7", "train.stop_after=2")
        assert column(run, "loss")[0] < column(fresh, "loss")[0] - 0.1
        shutil.rmtree(first)  # not needed any more
        again = tiny.screen("pupil", *load)
        assert f"resumed from {run / 'checkpoints' / folders.step_name(2)}\n" in again
        assert column(run, "step") == list(range(1, STEPS + 1))

    def test_nothing_starts_anew_if_nothing_is_reset(self, tiny):
        whole_run = tiny.train("whole-1x1", "parallel.pipeline_model_parallel_size=1")
        first = tiny.train("half", STOP)
        run = tiny.train("heir", f"checkpoint.load={first}", "checkpoint.reset=[]")
        assert column(run, "loss") == column(whole_run, "loss")[HALF:]

    def test_the_optimizer_alone(self, tiny):
        """The same batch and weights; the update of the step is without the earlier momentum."""
        whole_run = tiny.train("whole-1x1", "parallel.pipeline_model_parallel_size=1")
        first = tiny.train("half", STOP)
        run = tiny.train("restarted", f"checkpoint.load={first}", "checkpoint.reset=optimizer")
        first_loss, second_loss, *_ = column(run, "loss")
        expected = column(whole_run, "loss")[HALF:]
        assert first_loss == expected[0] and second_loss != expected[1]

    def test_another_model_and_two_beginnings_are_refused(self, tiny):
        first = tiny.train("half", STOP)
        with pytest.raises(RankFailedError, match=r"model\.norm_eps 1e-05 -> 0\.01"):
            tiny.train("wrong", f"checkpoint.load={first}", "model.norm_eps=1e-2")
        assert not (tiny.folder / "runs" / "wrong" / "checkpoints").exists()
        with pytest.raises(RankFailedError, match="both name a checkpoint"):
            tiny.train("wrong", f"checkpoint.load={first}", f"checkpoint.resume={first}")
        with pytest.raises(RankFailedError, match=r"checkpoint\.load: there is no folder /no"):
            tiny.train("wrong", "checkpoint.load=/no/where")


def test_starts_are_kept_with_where_they_come_from(tiny):
    run = tiny.train("started", "train.stop_after=1")
    tiny.train("started", "train.stop_after=2")
    first, second = map(json.loads, (run / "starts.jsonl").read_text().splitlines())
    assert [first["step"], second["step"]] == [0, 1]
    assert second["started"] >= first["started"] and first["host"] and first["command"]
    assert {"step": 1} | json.loads((run / "environment.json").read_text()) == second
    assert as_yaml(load_config(run / "config.yaml")) == (run / "config.yaml").read_text()
