"""A run goes on as what it is, or not at all: model, tokenizer, data; ends and
beginnings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from attnres_train.__main__ import main
from attnres_train.checkpoint import folders
from attnres_train.checkpoint.manifest import META, read_manifest
from attnres_train.config import load_config
from attnres_train.config.loader import as_yaml
from attnres_train.config.resume_table import EFFECTS, REFUSED, Effect
from attnres_train.config.schema import RunConfig
from attnres_train.errors import UserError
from attnres_train.identity import compare, nothing_left
from tests.config.test_resume_table import KEYS
from tests.data.tiny import write_text
from tests.parity.pool import RankFailedError
from tests.tiny import STEPS, TinyRuns, column, records, run_cli

HALF = STEPS // 2
STOP = f"train.stop_after={HALF}"
PLACE = Path("runs/x/checkpoints/step_00000060")
RECORD: dict[str, Any] = {
    "tokenizer": {"kind": "bpe", "sha256": "a" * 64, "eod": 0},
    "corpora": [{"key": "data.corpus.0", "name": "corpus", "digest": "c" * 16, "weight": 1.0}],
    "num_tokens": 1000,
    "num_valid_tokens": 100,
    "seed": 1234,
    "seq_length": 32,
    "split": [0.8, 0.2],
}


def extras(config: RunConfig, samples: int = 480, **more: Any) -> dict[str, Any]:
    progress = {"step": 60, "samples": samples, "tokens": 32 * samples}
    values = {"progress": progress, "config": config.model_dump(mode="json"), "data": RECORD}
    return values | more


def whole(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below ``folder``, content and time."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def runs(tmp_path, pool) -> TinyRuns:
    """With a corpus of their own."""
    return TinyRuns(tmp_path, pool)


@pytest.fixture(scope="module")
def config(tiny) -> RunConfig:
    return tiny.config("log.observers=[tests.own_observers:Quiet]")


class TestComparison:
    @pytest.mark.parametrize("key", KEYS)
    def test_each_key_changed_alone_is_refused_told_or_silent(self, config, key):
        """As the checkpoint has another value than the configuration of now."""
        saved = extras(config)
        *places, name = key.split(".")
        section = saved["config"]
        for place in places:
            section = section[place][0] if isinstance(section[place], list) else section[place]
        section[name] = "another"
        effect, shown = EFFECTS[key], f"{name} another -> "
        if effect in REFUSED:
            with pytest.raises(UserError) as refused:
                compare(config, PLACE, saved, RECORD)
            assert shown in str(refused.value)
            assert f"checkpoint.allow=[{effect.value}]" in str(refused.value)
            insisting = config.model_copy(deep=True)
            insisting.checkpoint.allow = [effect.value]
            first, second = compare(insisting, PLACE, saved, RECORD)
            assert first.startswith(f"checkpoint.allow: another {effect.value} (1 change); ")
            assert shown in second
        elif effect == Effect.RECIPE:
            (line,) = compare(config, PLACE, saved, RECORD)
            assert line.startswith("changed since step 60: ") and shown in line
        else:
            assert compare(config, PLACE, saved, RECORD) == []

    def test_all_that_differs_is_named_at_once(self, config):
        saved = extras(config)
        saved["config"]["model"]["norm_eps"] = 1e-2
        saved["config"]["run"]["seed"] = 7
        with pytest.raises(UserError) as refused:
            compare(config, PLACE, saved, RECORD)
        first, *listing, last = str(refused.value).splitlines()
        assert first == f"{PLACE} is of another model and data than this configuration:"
        assert sorted(listing) == [
            "  model.norm_eps 0.01 -> 1e-05 (model)",
            "  run.seed 7 -> 1234 (data)",
        ]
        assert "checkpoint.allow=[" in last and "run.name" in last

    def test_the_short_table_has_the_learning_rate_that_follows(self, config):
        saved = extras(config)
        saved["config"]["optimizer"]["lr"] = 0.004
        assert compare(config, PLACE, saved, RECORD) == [
            "changed since step 60: optimizer.lr 0.004 -> 0.01",
            "                       learning rate of step 61 0.004 -> 0.01",
        ]

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"tokenizer": RECORD["tokenizer"] | {"sha256": "b" * 64}}, "(tokenizer)"),
            ({"tokenizer": RECORD["tokenizer"] | {"eod": 3}}, "end of document) 0 -> 3"),
            ({"corpora": [RECORD["corpora"][0] | {"digest": "d" * 16}]}, "content of corpus) ccc"),
            ({"corpora": RECORD["corpora"] * 2}, "data.corpus.1"),
            ({"num_tokens": 999}, "training tokens 1000 -> 999 (data)"),
        ],
    )
    def test_other_content_behind_the_same_keys(self, config, change, told):
        with pytest.raises(UserError) as refused:
            compare(config, PLACE, extras(config), RECORD | change)
        assert told in str(refused.value)

    def test_before_the_first_sample_any_order_will_do(self, config):
        saved = extras(config, samples=0)
        saved["config"]["run"]["seed"] = 7
        (line,) = compare(config, PLACE, saved, RECORD)
        assert line == "changed since step 60: run.seed 7 -> 1234"

    def test_a_checkpoint_of_before_the_records(self, config):
        saved = {key: value for key, value in extras(config).items() if key != "data"}
        (line,) = compare(config, PLACE, saved, RECORD)
        assert (
            line == f"{PLACE} has no record of its tokenizer and data: they could not be compared"
        )

    def test_a_class_that_is_gone_is_told_as_a_change(self, config):
        saved = extras(config)
        saved["config"]["lr_schedule"]["kind"] = "gone:Away"
        saved["config"]["log"]["observers"] = [{"kind": "gone:Too", "options": {}}]
        (line,) = compare(config, PLACE, saved, RECORD)
        assert line == "changed since step 60: lr_schedule.kind gone:Away -> constant"

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            (["train.train_iters=60"], "finished at step 60 of 60; raise train.train_iters"),
            (["train.train_iters=90", "train.stop_after=50"], "stopped at step 60 of 90"),
            (["train.train_iters=90", "train.stop_after=70"], None),
            (["train.train_iters=90"], None),
        ],
    )
    def test_what_is_left(self, tiny, changes, told):
        config = tiny.config(*changes)
        found = nothing_left(config, PLACE, extras(config))
        assert found is None if told is None else found.startswith(told)

    def test_an_end_before_the_step_reached(self, tiny):
        config = tiny.config("train.train_iters=20")
        with pytest.raises(UserError, match=r"train.train_iters is 20, but \S+ is at step 60: "):
            nothing_left(config, PLACE, extras(config))


def test_a_recipe_is_changed_told_and_kept(tiny, capsys):
    run = tiny.train("recipe", STOP)
    screen = tiny.screen("recipe", "optimizer.lr=0.001")
    told = screen.split("resumed from ")[1].splitlines()
    assert told[1] == f"changed since step {HALF}: optimizer.lr 0.01 -> 0.001"
    assert column(run, "lr") == [0.01] * HALF + [0.001] * (STEPS - HALF)
    first, second = sorted((run / "history").iterdir())
    assert [first.stem, second.stem] == [folders.step_name(step) for step in (0, HALF)]
    assert load_config(first).optimizer.lr == 0.01
    assert second.read_text() == (run / "config.yaml").read_text()
    assert main(["report", str(run)]) == 0
    report = capsys.readouterr().out
    assert f"step {STEPS} of {STEPS}, finished" in report
    assert f"changed  optimizer.lr 0.01 -> 0.001 after step {HALF}" in report


def test_a_finished_run_says_so_and_changes_nothing(tiny):
    run = tiny.train("whole-1x1", "parallel.pipeline_model_parallel_size=1")
    files = whole(tiny.folder)
    done = run_cli("train", tiny.path, "run.name=whole-1x1", "optimizer.lr=1e-3")
    assert (done.returncode, done.stderr) == (0, "")
    told = f"finished at step {STEPS} of {STEPS}; raise train.train_iters to go on\n"
    assert done.stdout == told
    assert tiny.screen("whole-1x1", "optimizer.lr=2e-3") == told
    lower = run_cli("train", tiny.path, "run.name=whole-1x1", "train.train_iters=2")
    assert lower.returncode == 2
    assert f"error: train.train_iters is 2, but {run}" in lower.stderr
    assert whole(tiny.folder) == files


def test_a_corpus_that_has_grown_is_refused_before_a_worker_starts(runs, monkeypatch, capsys):
    run = runs.train("grown", STOP)
    kept = json.loads((run / "data.json").read_text())
    (file,) = (run / "tokenizer").iterdir()
    assert len(kept["tokenizer"]["sha256"]) == 64 and file.name == "tokenizer.json"
    write_text(runs.folder / "corpus", 24, 40)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("attnres_train.commands.train.launch", lambda *_: pytest.fail("started"))
    files = whole(run)
    assert main(["train", str(runs.path), "run.name=grown"]) == 2
    error = capsys.readouterr().err.partition("error: ")[2]
    assert "is of another data and tokenizer than this configuration" in error
    assert "  data.corpus.0 (content of " in error and "  training tokens " in error
    with pytest.raises(RankFailedError, match="is of another data and tokenizer"):
        runs.train("grown", "log.interval=1")
    assert whole(run).keys() >= files.keys() and column(run, "step") == [1, 2, 3]
    screen = runs.screen("grown", "checkpoint.allow=[data,tokenizer]")
    assert f"the next sample is number {8 * HALF} of the new order" in screen
    assert column(run, "step") == list(range(1, STEPS + 1))
    assert json.loads((run / "data.json").read_text())["num_tokens"] > kept["num_tokens"]
    names = sorted(path.name for path in (run / "tokenizer").iterdir())
    assert names == ["tokenizer.json", f"tokenizer.until-{folders.step_name(HALF)}.json"]


def test_insisting_on_another_model(tiny):
    tiny.train("insisted", STOP)
    with pytest.raises(RankFailedError, match=r"moe\.num_experts_per_token 2 -> 1"):
        tiny.train("insisted", "model.moe.num_experts_per_token=1")
    screen = tiny.screen(
        "insisted", "model.moe.num_experts_per_token=1", "checkpoint.allow=[model]"
    )
    assert "checkpoint.allow: another model (1 change); the weights go into another" in screen
    # Allowed, but the tensors are not there.
    with pytest.raises(RankFailedError, match="does not fit this run's model"):
        tiny.train(
            "insisted", "model.moe.num_experts=3", "checkpoint.allow=[model]", "train.train_iters=9"
        )


def test_a_run_of_before_the_records_resumes_with_one_line(tiny):
    run = tiny.train("older", STOP)
    for name in ("history", "data.json", "tokenizer", "starts.jsonl"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    meta = run / "checkpoints" / folders.step_name(HALF) / META
    content = json.loads(meta.read_text())
    del content["extras"]["data"], content["extras"]["config"]["checkpoint"]["allow"]
    meta.write_text(json.dumps(content))
    told = tiny.screen("older").split("resumed from ")[1].splitlines()
    assert told[1].endswith("has no record of its tokenizer and data: they could not be compared")
    assert "changed since" not in "\n".join(told)
    assert [path.stem for path in sorted((run / "history").iterdir())] == [
        folders.step_name(step) for step in (0, HALF)
    ]


class TestBeginnings:
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
        assert column(run, "step") == [1, 2] and column(run, "tokens") == [256, 512]
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
