"""Machines with less than ours: a cache that cannot be written to, a file system without locks, few
open files."""

from __future__ import annotations

import errno
import fcntl
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attnres_train.data import prepare as module
from attnres_train.data.indexed import TokenSequences, keep_open
from attnres_train.data.loader import open_data
from attnres_train.data.prepare import prepare
from tests.data.tiny import cached, run_config, text_corpus, write_indexed, write_text

# Prepares {corpora} in the cache {cache}, and reads batches.
READ = """
import sys
from attnres_train.data.loader import open_data
from attnres_train.data.prepare import prepare
from attnres_train.errors import UserError
from tests.data.tiny import run_config, text_corpus
config = run_config(sys.argv[1], [text_corpus(path) for path in sys.argv[2:]])
config.train.eval_interval = 1
try:
    data = open_data(config, prepare(config, progress=False))
except UserError as error:
    sys.exit(f"told: {error}")
for step in range(40):
    data.micro_batches(0, 0, 1), data.validation_batches(0, 0, 1)
"""


@pytest.fixture
def texts(tmp_path) -> Path:
    return write_text(tmp_path / "texts", 12)


def test_what_is_prepared_is_neither_locked_nor_written(tmp_path, texts, monkeypatch):
    config = run_config(tmp_path / "cache", [text_corpus(texts)])
    first = prepare(config, progress=False)
    (tmp_path / "cache" / "lock").unlink()
    before = sorted((tmp_path / "cache").rglob("*")), cached(tmp_path / "cache")

    def never(*arguments):
        raise AssertionError("asked for the lock")

    monkeypatch.setattr(module, "locked", never)
    assert prepare(config, progress=False) == first
    assert (sorted((tmp_path / "cache").rglob("*")), cached(tmp_path / "cache")) == before
    (texts / "000.txt").write_text("another text")
    with pytest.raises(AssertionError, match="asked for the lock"):
        prepare(config, progress=False)


def read_only(folder: Path, *command: str) -> subprocess.CompletedProcess:
    """Run ``command`` where ``folder`` is a read-only mount: root too may not write there."""
    script = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if (
        not shutil.which("unshare")
        or subprocess.run(
            [*unshare, script, str(folder), "true"], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("no mount namespaces here")
    arguments = [*unshare, script, str(folder), *command]
    return subprocess.run(arguments, check=False, capture_output=True, text=True)


@pytest.mark.nightly
def test_a_read_only_mount(tmp_path, texts):
    """(datasets#6589)"""
    cache = tmp_path / "cache"
    config = run_config(cache, [text_corpus(texts)], train__eval_interval=1)
    prepare(config, progress=False)
    command = [sys.executable, "-c", READ, str(cache), str(texts)]
    done = read_only(cache, *command)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    (texts / "000.txt").write_text("another text")
    done = read_only(cache, *command)
    assert done.returncode == 1
    assert done.stderr.startswith(f"told: data.cache_dir {cache} cannot be written: ")
    assert "Read-only file system" in done.stderr


def test_a_file_system_without_locks(tmp_path, texts, monkeypatch, capsys):
    """(filelock#67)"""

    def none_here(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none_here)
    config = run_config(tmp_path / "cache", [text_corpus(texts)])
    first = prepare(config)
    assert (
        "has no locks (No locks available): let no other run or machine" in capsys.readouterr().err
    )
    assert len(open_data(config, first).micro_batches(0, 0, 1)) == 4
    assert prepare(config) == first
    assert "locks" not in capsys.readouterr().err


class TestFewOpenFiles:
    """A shell allows a process 1024 (Megatron-LM#929)."""

    @pytest.mark.nightly
    def test_200_shards(self, tmp_path):
        """Each read for training and for validation; made and read under the limit."""
        write_text(tmp_path / "texts", 200)
        limited = (
            "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))\n"
            "from attnres_train.data import shards; shards.PART_BYTES = 1\n"
        )
        arguments = [str(tmp_path / "cache"), str(tmp_path / "texts")]
        command = [sys.executable, "-c", limited + READ, *arguments]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert len(list((tmp_path / "cache" / "shards").glob("*/part_*/*.bin"))) == 200

    def test_no_more_than_are_kept_open(self, tmp_path):
        prefixes = [write_indexed(tmp_path / f"{n:03d}", [[n, n], [n]]) for n in range(60)]
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        opened = len(list(Path("/proc/self/fd").iterdir()))
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 20, limit[1]))
            together = keep_open(4)
            ones = [TokenSequences(prefixes, together) for _ in range(3)]
            for data in ones:
                for _ in range(2):
                    assert [data.get(i).tolist() for i in (1, 118)] == [[0], [59, 59]]
                    assert [data.length(i) for i in range(120)] == [2, 1] * 60
            held = len(list(Path("/proc/self/fd").iterdir())) - opened
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        assert 0 < held <= 8
