"""Machines and callers that are not as ours: no name, closed streams, a key pressed early."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import command, environment, records, write_config

SLOW = """
import hashlib, time
from attnres_train.extend import CorpusReader, TokenizerKind

class Deaf(TokenizerKind):
    # Trains outside of Python, where no signal is looked at, as a library in Rust does.
    trains_on_corpora = True

    def train(self, texts, path):
        open("started", "w").close()
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2**31 - 1)

class Slow(CorpusReader):
    def find_files(self):
        open("started", "w").close()
        time.sleep(600)
        yield "never"
"""


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", line],
        env=environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def training(folder: Path, *overrides: str) -> str:
    overrides = ("train.train_iters=2", "train.eval_interval=0", *overrides)
    return shlex.join(command("train", write_config(folder), *overrides))


@pytest.mark.nightly
def test_a_host_name_that_leads_nowhere(tmp_path):
    probe = ["unshare", "-u", "sh", "-c", "hostname nohost123"]
    if (
        not shutil.which("unshare")
        or subprocess.run(probe, capture_output=True, check=False).returncode
    ):
        pytest.skip("no permission for a host name of one's own")
    train = training(tmp_path, "parallel.pipeline_model_parallel_size=2")
    done = shell(f"unshare -u sh -c {shlex.quote('hostname nohost123 && ' + train)}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "c10d" not in done.stderr
    assert len(records(tmp_path / "runs" / "tiny")) == 2


@pytest.mark.parametrize(
    "closed",
    [">&- 2>&- <&-", *(pytest.param(c, marks=pytest.mark.nightly) for c in ("2>&-", "<&- 2>&-"))],
)
def test_closed_streams(tmp_path, closed):
    done = shell(f"{training(tmp_path)} {closed}", tmp_path)
    assert done.returncode == 0, (done.stdout, done.stderr)
    run = tmp_path / "runs" / "tiny"
    assert [record["step"] for record in records(run)] == [1, 2]
    assert list((run / "checkpoints").glob("step_*"))
    assert done.stderr == ""


def test_an_error_with_stderr_closed_has_its_code_and_stays_off_stdout(tmp_path):
    done = shell(f"{training(tmp_path, 'train.seq_length=0')} 2>&-", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("what", ["corpus", "tokenizer"])
def test_ctrl_c_while_preparing_ends_with_one_line(tmp_path, what):
    (tmp_path / "slow.py").write_text(SLOW)
    path = write_config(tmp_path)
    slow = {
        "corpus": f"data.corpus=[{{kind: 'slow:Slow', path: {tmp_path / 'corpus'}}}]",
        "tokenizer": "data.tokenizer={kind: 'slow:Deaf'}",
    }
    words = ["train", str(path), slow[what]]
    # Where these tests run in the background, SIGINT is ignored, also by what they start.
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    start += f"from attnres_train.__main__ import main; raise SystemExit(main({words}))"
    process = subprocess.Popen(
        [sys.executable, "-c", start],
        env=environment(PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[2])])),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "started").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "stopped by SIGINT"
    assert "Traceback" not in errors
