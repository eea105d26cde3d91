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
from attnres_train.checkpoint.manifest import META
from attnres_train.config import load_config
from attnres_train.config.resume_table import EFFECTS, REFUSED, Effect
from attnres_train.config.schema import RunConfig
from attnres_train.errors import UserError
from attnres_train.runs.identity import compare, nothing_left
from tests.checkpoint.toy import rewrite_meta
from tests.config.test_resume_table import KEYS
from tests.data.tiny import write_text
from tests.parity.pool import RankFailedError
from tests.tiny import SAMPLES, STEPS, TinyRuns, column, run_cli, whole

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
    "samples": 2,
    "held_out": 0.2,
}


def extras(config: RunConfig, samples: int = 480, **more: Any) -> dict[str, Any]:
    progress = {"step": 60, "samples": samples, "tokens": 32 * samples}
    values = {"progress": progress, "config": config.model_dump(mode="json"), "data": RECORD}
    return values | more


@pytest.fixture
def runs(tmp_path, pool) -> TinyRuns:
    """With a corpus of their own."""
    return TinyRuns(tmp_path, pool)


@pytest.fixture(scope="module")
def config(tiny) -> RunConfig:
    return tiny.config("log.observers=[tests.own_observers:Quiet]")


@pytest.fixture(scope="module")
def with_every_key(tiny) -> RunConfig:
    return tiny.config("log.observers=[tests.own_observers:Quiet]", "stages=[{name: whole}]")


class TestComparison:
    @pytest.mark.parametrize("key", KEYS)
    def test_each_key_changed_alone_is_refused_told_or_silent(self, with_every_key, key):
        """As the checkpoint has another value than the configuration of now."""
        config = with_every_key
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
            (
                {"samples": 3},
                "shuffled and held out) version 2 -> version 3",
            ),
            (
                {"held_out": 0.0},
                "0 where train.eval_interval is 0, 0.2 -> 0.0 (data)",
            ),
        ],
    )
    def test_other_content_behind_the_same_keys(self, config, change, told):
        with pytest.raises(UserError) as refused:
            compare(config, PLACE, extras(config), RECORD | change)
        assert told in str(refused.value)

    def test_samples_of_before_they_had_a_version(self, config):
        before = {key: RECORD[key] for key in RECORD if key not in ("samples", "held_out")}
        with pytest.raises(UserError) as refused:
            compare(config, PLACE, extras(config, data=before), RECORD)
        first, *listing, _ = str(refused.value).splitlines()
        assert first.endswith("is of another data than this configuration:")
        assert listing == [
            "  samples (how documents are cut, shuffled and held out) version 1 -> version 2 (data)"
        ]

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
    assert "is of another data than this configuration" in error
    assert f"(files of text {runs.folder}/corpus; 8 new: 016.txt, 017.txt, 018.txt, ...)" in error
    with pytest.raises(RankFailedError, match="is of another data than"):
        runs.train("grown", "log.interval=1")
    assert whole(run).keys() >= files.keys() and column(run, "step") == [1, 2, 3]
    screen = runs.screen("grown", "checkpoint.allow=[data,tokenizer]")
    assert f"the next sample is number {SAMPLES * HALF} of the new order" in screen
    assert column(run, "step") == list(range(1, STEPS + 1))
    assert json.loads((run / "data.json").read_text())["num_tokens"] > kept["num_tokens"]
    # What the run has learnt with is what it goes on with: none is trained anew.
    assert [path.name for path in (run / "tokenizer").iterdir()] == ["tokenizer.json"]
    sizes = [
        run / "tokenizer" / "tokenizer.json",
        *(runs.folder / "cache" / "tokenizers").iterdir(),
    ]
    assert len(sizes) == 2


def test_validation_switched_off_is_other_data(tiny):
    """Told by its key: what was held out would be trained on."""
    run = tiny.train("unvalidated", STOP)
    held_out = json.loads((run / "data.json").read_text())["held_out"]
    assert held_out == pytest.approx(0.2)
    with pytest.raises(RankFailedError) as refused:
        tiny.train("unvalidated", "train.eval_interval=0")
    assert f"0 where train.eval_interval is 0, {held_out} -> 0.0 (data)" in str(refused.value)
    assert "  training tokens " in str(refused.value)
    screen = tiny.screen("unvalidated", "train.eval_interval=999")
    assert f"changed since step {HALF}: train.eval_interval 3 -> 999" in screen


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

    def forget(content: dict[str, Any]) -> None:
        del content["extras"]["data"], content["extras"]["config"]["checkpoint"]["allow"]

    rewrite_meta(meta, forget)
    told = tiny.screen("older").split("resumed from ")[1].splitlines()
    assert told[1].endswith("has no record of its tokenizer and data: they could not be compared")
    assert "changed since" not in "\n".join(told)
    assert [path.stem for path in sorted((run / "history").iterdir())] == [
        folders.step_name(step) for step in (0, HALF)
    ]
