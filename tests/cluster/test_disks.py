"""A disk that fills while data are prepared, while a run saves, or while it logs."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from attnres_train.checkpoint.folders import step_name
from attnres_train.checkpoint.verify import verify
from attnres_train.config import load_config
from attnres_train.data.prepare import prepare
from tests.cluster.disks import on_disk, why_not
from tests.data.tiny import write_text
from tests.tiny import command, free_port, write_config

RANK = ["RANK=0", "LOCAL_RANK=0", "WORLD_SIZE=1", "MASTER_ADDR=127.0.0.1"]


def too_large(folder: Path) -> Path:
    """A config whose corpus makes some 800 KB of tokens in several parts."""
    config = write_config(folder)
    write_text(folder / "corpus", 40, 700)
    return config


@pytest.mark.parametrize("room", [pytest.param(100_000, marks=pytest.mark.nightly), 500_000])
def test_a_disk_that_fills_while_data_are_prepared(tmp_path, room):
    cache = tmp_path / "cache"
    cache.mkdir()
    if why := why_not(cache):
        pytest.skip(why)
    config, kept = too_large(tmp_path), tmp_path / "kept"
    words = command("data", config)
    done = on_disk(cache, room, words, keep=kept)
    assert done.stdout.splitlines()[-1] == "2", done.stderr
    *_, told = done.stderr.splitlines()
    assert told.startswith("error: data.cache_dir: the disk is full, ") and "does not fit" in told
    assert not list(kept.rglob("*.partial")), "what does not fit is removed"

    made = {path.relative_to(kept) for path in kept.rglob("tokenizer.json")}
    shutil.rmtree(cache)
    shutil.copytree(kept, cache)
    whole = prepare(load_config(config, []), progress=False)
    assert whole.num_tokens > 100_000
    assert made <= {path.relative_to(cache) for path in cache.rglob("tokenizer.json")}


@pytest.mark.parametrize("last", [7, pytest.param(0, marks=pytest.mark.nightly)])
def test_a_run_whose_checkpoints_lie_on_a_disk_that_fills(tmp_path, last):
    """The disk is full from step 4 to step ``last``, or to the end: then there is room for the next
    attempt. What was saved at step 3 is whole, whatever happens."""
    config, run, kept = write_config(tmp_path), tmp_path / "runs" / "tiny", tmp_path / "kept"
    run.mkdir(parents=True)
    if why := why_not(run):
        pytest.skip(why)
    prepare(load_config(config, []), progress=False)
    words = ["train", str(config), "train.train_iters=9", "train.eval_interval=0"]
    words.append("checkpoint.async_save=false")
    hog = f"log.observers=[{{kind: tests.own_observers:Hog, options: {{first: 4, last: {last}}}}}]"
    screen = tmp_path / "screen"
    alone = ["env", *RANK, f"MASTER_PORT={free_port()}", "sh", "-c"]
    commands = [[*alone, _on_screen([*words, hog], screen)]]
    if not last:
        there = run / "checkpoints" / step_name(3)
        commands += [command("checkpoint", "verify", there), ["rm", str(run / "hog")]]
        commands += [[*alone, _on_screen(words, screen)]]
    done = on_disk(run, 8 << 20, *commands, keep=kept)
    told = screen.read_text()
    first, *_ = told.split("resumed from ")
    codes = [line for line in done.stdout.splitlines() if line.isdigit()]
    assert codes == (["0"] if last else ["2", "0", "0", "0"]), done.stdout + done.stderr + told
    if last:
        (line,) = [line for line in told.splitlines() if "could not be written" in line]
        assert "the checkpoint of step 6 " in line and "No space left on device" in line
    else:
        assert "the checkpoint of step 9 could not be written" in first
        assert f"resumed from {run / 'checkpoints' / step_name(3)}" in told
    saved = sorted((kept / "checkpoints").iterdir())
    wanted = (3, 9) if last else (3, 6, 9)
    assert [path.name for path in saved] == list(map(step_name, wanted))
    assert [verify(path).problems for path in saved] == [[]] * len(saved)
    steps = [json.loads(line)["step"] for line in (kept / "metrics.jsonl").open()]
    assert steps == list(range(1, 10))


@pytest.mark.nightly
@pytest.mark.parametrize("last", [6, 0])
def test_a_run_whose_logs_lie_on_a_disk_that_fills(tmp_path, last):
    """Metrics, TensorBoard, the rank's log and the screen; checkpoints lie on another one. The disk
    is full at step 2, and has room again at step ``last``, or never."""
    config, run, kept = write_config(tmp_path), tmp_path / "runs" / "tiny", tmp_path / "kept"
    run.mkdir(parents=True)
    if why := why_not(run):
        pytest.skip(why)
    prepare(load_config(config, []), progress=False)
    (tmp_path / "checkpoints").mkdir()
    words = [
        *("train", str(config), "train.train_iters=8", "log.interval=1", "log.tensorboard=true"),
        f"log.observers=[{{kind: tests.own_observers:Hog, options: {{first: 2, last: {last}}}}}]",
    ]
    done = on_disk(
        run,
        2 << 20,
        ["ln", "-s", str(tmp_path / "checkpoints"), str(run / "checkpoints")],
        ["env", *RANK, f"MASTER_PORT={free_port()}", "sh", "-c", _on_screen(words, run / "screen")],
        keep=kept,
    )
    screen = (kept / "screen").read_text()
    assert done.stdout.split() == ["0", "0"], done.stderr + screen
    saved = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in saved] == [step_name(step) for step in (6, 8)]
    assert [verify(path).problems for path in saved] == [[], []]
    assert f"{run}/metrics.jsonl cannot be written: [Errno 28] No space left on device" in screen
    assert "the run goes on without observer log.tensorboard" in screen
    written = (kept / "metrics.jsonl").read_text()
    assert written.endswith("\n"), "no part of a line"
    steps = [json.loads(line)["step"] for line in written.splitlines()]
    assert steps == (list(range(1, 9)) if last else [1])
    if last:
        assert "metrics.jsonl is written again, with all 5 steps since" in screen
        assert any(line.startswith("step 8/8 ") for line in screen.splitlines())


def _on_screen(words: list[str], screen: Path) -> str:
    """A shell's line for a command whose screen is a file."""
    return f"exec {shlex.join(command(*words))} >> {shlex.quote(str(screen))} 2>&1"
