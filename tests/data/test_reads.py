"""How often one start opens the files of its corpora."""

from __future__ import annotations

import subprocess
from collections import Counter

import pytest
import yaml

from attnres_train.config import load_config
from attnres_train.data.prepare import prepare
from tests.data.tiny import write_indexed
from tests.tiny import command, environment, write_config

# What Python runs first in every process of the run: notes who of ours opens files of a corpus.
NOTING = """
import os, sys
log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def note(event, arguments):
    if event != "open" or not str(arguments[0]).startswith({corpus!r}):
        return
    frame = sys._getframe(1)
    while frame and "attnres_train" not in frame.f_globals.get("__name__", ""):
        frame = frame.f_back
    name = frame.f_code.co_name if frame else "?"
    os.write(log, f"{{name}} {{os.path.basename(arguments[0])}}\\n".encode())
sys.addaudithook(note)
"""


@pytest.mark.nightly
def test_a_start_looks_at_each_file_once(tmp_path):
    """Launcher and worker together, where the data are prepared."""
    no_validation = "train.eval_interval=0"
    corpus, log, hook = tmp_path / "corpus", tmp_path / "opened", tmp_path / "hook"
    config, prefix = write_config(tmp_path), write_indexed(corpus / "tokens", [[7] * 40] * 40)
    plain = yaml.safe_load(config.read_text())
    plain["data"]["corpus"].append({"kind": "indexed", "path": prefix})
    config.write_text(yaml.safe_dump(plain))
    prepare(load_config(config, [no_validation]), progress=False)
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(NOTING.format(log=str(log), corpus=str(corpus)))
    here = environment()
    here["PYTHONPATH"] = f"{hook}:{here.get('PYTHONPATH', '')}"
    words = command("train", config, "train.train_iters=1", no_validation)
    done = subprocess.run(words, env=here, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = Counter(log.read_text().splitlines())
    texts = {f"read_content {number:03d}.txt": 1 for number in range(16)}
    tokens = {
        "read_content tokens.idx": 1,  # 16 blocks of it
        "read_content tokens.bin": 1,
        "check_indexed tokens.idx": 2,  # the two arrays that are looked through
    }
    by_rank = {
        "read_header tokens.idx": 3,  # for the check, for a count, and for reading
        "num_sequences tokens.idx": 1,  # the last sequence
        "__init__ tokens.idx": 1,  # in memory
        "__init__ tokens.bin": 1,
    }
    assert found == texts | tokens | by_rank
