"""A run whose corpus has changed: refused by name, appended to, begun anew."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from attnres_train.__main__ import main
from attnres_train.checkpoint.folders import step_name
from attnres_train.data.document_hashes import TextHash
from attnres_train.data.held_out import is_held_out
from attnres_train.data.loader import open_data
from attnres_train.errors import UserError
from attnres_train.runs.preparation import prepare_run
from tests.data.tiny import sentence
from tests.parity.pool import RankFailedError
from tests.tiny import SAMPLES, STEPS, TOKENS, TinyRuns, column, run_cli

STOP = "train.stop_after={}".format


@pytest.fixture
def runs(tmp_path, pool) -> TinyRuns:
    """With a corpus of their own."""
    return TinyRuns(tmp_path, pool)


def add(runs: TinyRuns, name: str, first: int = 5000, *, held_out: bool = False) -> Path:
    """A file of some samples, new to the corpus, whose document is held out or not."""
    file = runs.folder / "corpus" / name
    file.write_text(next(text for text in texts(first) if is_held(text) == held_out))
    return file


def texts(first: int) -> Iterator[str]:
    for start in count(first, 1000):
        yield "".join(sentence(start + line) + "\n" for line in range(60))


def is_held(text: str) -> bool:
    document = TextHash()
    document.update(text)
    return bool(is_held_out(np.array([document.take()], np.uint64), 0.2)[0])


def record(run: Path) -> dict:
    return json.loads((run / "data.json").read_text())["corpora"][0]


def samples(runs: TinyRuns, *overrides: str, number: int) -> list[list[int]]:
    config = runs.config(*overrides)
    train = open_data(config, prepare_run(config, progress=False).prepared).train
    return [train[n]["tokens"].tolist() for n in range(number)]


def test_files_are_appended_once_and_stay(runs):
    """From end to end: trained, grown, refused by name, appended, resumed, grown once more."""
    name = "run.name=grown"
    run = runs.train("grown", STOP(2))
    tokenizer = (run / "tokenizer" / "tokenizer.json").read_bytes()
    before = samples(runs, name, number=2 * SAMPLES)
    add(runs, "new.txt")
    refused = run_cli("train", runs.path, name)
    assert refused.returncode == 2 and "training a byte-level BPE" not in refused.stderr
    assert "step_00000002 is of another data than this configuration:" in refused.stderr
    assert f"(files of text {runs.folder}/corpus; 1 new: new.txt) 16 -> 17 (data)" in refused.stderr
    assert "data.new=append" in refused.stderr and "data.new=restart" in refused.stderr

    screen = runs.screen("grown", "data.new=append", STOP(3))
    assert f"(files of text {runs.folder}/corpus) 16 -> 17 (the new from its " in screen
    assert column(run, "step") == [1, 2, 3]
    (later,) = record(run)["later"]
    assert (later["start"], later["num_files"], record(run)["num_files"]) == (2 * SAMPLES, 1, 16)
    assert (run / "tokenizer" / "tokenizer.json").read_bytes() == tokenizer
    assert [path.name for path in (run / "tokenizer").iterdir()] == ["tokenizer.json"]

    # What the run has it knows: nothing is asked for again, and the order is the same.
    taken = samples(runs, name, number=60)
    assert taken[: 2 * SAMPLES] == before
    assert "changed since" not in runs.screen("grown", STOP(4))
    assert samples(runs, name, number=60) == taken
    add(runs, "third.txt", first=7000)
    runs.train("grown", "data.new=append")
    assert [one["start"] for one in record(run)["later"]] == [2 * SAMPLES, 4 * SAMPLES]
    assert samples(runs, name, "train.train_iters=9", number=4 * SAMPLES) == taken[: 4 * SAMPLES]
    assert column(run, "step") == list(range(1, STEPS + 1))
    assert all(
        len(list((run / "files").glob(f"{digest}.jsonl.gz"))) == 1 for digest in digests(run)
    )


def digests(run: Path) -> list[str]:
    return [record(run)["files"], *(one["files"] for one in record(run)["later"])]


def test_the_history_tells_what_was_appended_and_validation_stays(runs, capsys):
    run = runs.train("told", STOP(3))
    held_out = runs.config("run.name=told")
    prepared = prepare_run(held_out, progress=False).prepared
    valid = [open_data(held_out, prepared).valid[n]["tokens"].tolist() for n in range(8)]
    add(runs, "new.txt")
    grown = runs.config("run.name=told", "data.new=append")
    appended = prepare_run(grown, progress=False).prepared
    assert [open_data(grown, appended).valid[n]["tokens"].tolist() for n in range(8)] == valid
    assert appended.num_tokens > prepared.num_tokens
    assert appended.num_valid_tokens == prepared.num_valid_tokens
    runs.train("told", "data.new=append")
    assert main(["report", str(run)]) == 0
    told = capsys.readouterr().out
    assert f"16 -> 17 (the new from its sample {3 * SAMPLES} on) after step 3" in told


@pytest.mark.parametrize("what", ["changed", "gone"])
def test_what_the_run_has_read_must_be_there(runs, what):
    runs.train("kept", STOP(2))
    file = add(runs, "new.txt").with_name("003.txt")
    if what == "gone":
        file.unlink()
    else:
        file.write_text("something else\n")
    with pytest.raises(RankFailedError) as refused:
        runs.train("kept", "data.new=append")
    assert f"1 new: new.txt, 1 {what}: 003.txt" in str(refused.value)
    assert "Put new documents into new files" in str(refused.value)


def test_new_files_that_are_held_out_make_no_sample(runs):
    runs.train("held", STOP(2))
    add(runs, "new.txt", held_out=True)
    config = runs.config("run.name=held", "data.new=append")
    with pytest.raises(UserError) as refused:
        prepare_run(config, progress=False)
    assert "corpus, new files) has 0 training tokens" in str(refused.value)
    assert "are held out by the hash of their document; add more files" in str(refused.value)
    add(runs, "newer.txt")
    (source,) = prepare_run(config, progress=False).prepared.sources
    assert source.later[0].num_files == 2


def test_restart_begins_the_new_data_and_goes_on_with_the_steps(runs, capsys):
    run = runs.train("anew", STOP(2))
    (runs.folder / "corpus" / "003.txt").write_text("something else\n" * 30)
    screen = runs.screen("anew", "data.new=restart", STOP(3))
    assert "data.new=restart: the data begin anew, at sample 0 of their new order" in screen
    assert column(run, "step") == [1, 2, 3]
    assert column(run, "tokens") == [TOKENS, 2 * TOKENS, 3 * TOKENS]
    meta = json.loads((run / "checkpoints" / step_name(3) / "meta.json").read_text())
    place = {"step": 3, "samples": SAMPLES, "tokens": 3 * TOKENS}
    assert place.items() <= meta["extras"]["progress"].items()
    assert record(run)["later"] == [] and record(run)["num_files"] == 16
    # Said once more, as by a job that is requeued, it means nothing.
    assert "begin anew" not in runs.screen("anew", "data.new=restart", STOP(4))
    meta = json.loads((run / "checkpoints" / step_name(4) / "meta.json").read_text())
    assert meta["extras"]["progress"]["samples"] == 2 * SAMPLES
    assert main(["report", str(run)]) == 0
    assert "the data begin anew, at sample 0 of their new order after step 2" in (
        capsys.readouterr().out
    )


def test_append_is_for_files_alone(runs):
    runs.train("weighed", STOP(2))
    add(runs, "new.txt")
    changed = ["data.split=[0.7,0.3]", "data.new=append"]
    with pytest.raises(RankFailedError, match=r"data\.split \[0\.8, 0\.2\] -> \[0\.7, 0\.3\]"):
        runs.train("weighed", *changed)
    with pytest.raises(RankFailedError, match="only files may be new"):
        runs.train("weighed", *changed, "checkpoint.allow=data")


def test_a_run_of_before_the_lists_says_what_cannot_be_known(runs):
    run = runs.train("older", STOP(2))
    for file in (run / "files").iterdir():
        file.unlink()
    add(runs, "new.txt")
    with pytest.raises(RankFailedError, match="no list of its files is kept"):
        runs.train("older", "data.new=append")
    with pytest.raises(
        RankFailedError, match=r"data\.corpus\.0 \(content of .*\n.*\n.*data\.new=app"
    ):
        runs.train("older")
