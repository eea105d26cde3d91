"""Prints and progress bars on streams that fail, and a run whose streams all do."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys

import pytest
from tqdm import tqdm

from attnres_train.screen import Forgiving, say
from tests.tiny import STEPS, column, command, environment


def pipe_without_reader():
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", encoding="utf-8")


def test_a_line_is_printed_at_once(capfd):
    assert say("a line") is None
    assert capfd.readouterr().out == "a line\n"


def test_a_pipe_without_reader_leads_nowhere_from_then_on():
    with pipe_without_reader() as stream:
        assert say("lost", stream).errno == errno.EPIPE
        assert say("lost too", stream) is None
        assert os.write(stream.fileno(), b"as by a library in C") == 20


def test_a_full_disk_is_tried_again():
    with open("/dev/full", "w", encoding="utf-8") as stream:
        assert [say(text, stream).errno for text in ("a", "b")] == [errno.ENOSPC] * 2
        assert os.readlink(f"/proc/self/fd/{stream.fileno()}") == "/dev/full"
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # room again
        assert say("c", stream) is None


def test_a_closed_stream_fails_quietly():
    stream = io.StringIO()
    stream.close()
    assert isinstance(say("lost", stream), ValueError)


def full_disk():
    return open("/dev/full", "w")


@pytest.mark.parametrize("failing", [pipe_without_reader, full_disk])
def test_a_bar_goes_on_where_it_cannot_be_drawn(failing):
    stream = failing()
    with tqdm(total=3, file=Forgiving(stream), mininterval=0, disable=False) as bar:
        for _ in range(3):
            bar.update(1)
        bar.clear()
        bar.refresh()
    assert bar.n == 3
    with pytest.raises(OSError):
        stream.close()


@pytest.mark.parametrize(
    "closed",
    [False, pytest.param(True, marks=pytest.mark.nightly)],
    ids=["full and without reader", "closed"],
)
def test_a_run_whose_streams_fail_is_trained_and_saved(tiny, closed):
    name = f"unheard-{closed}"
    words = command("train", tiny.path, f"run.name={name}", "log.progress=on", "log.interval=1")
    if closed:
        words = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *words]
    with open("/dev/full", "w") as full, pipe_without_reader() as pipe:
        code = subprocess.run(words, stdout=pipe, stderr=full, env=environment(), check=False)
    assert code.returncode == 0
    run = tiny.folder / "runs" / name
    assert column(run, "step") == list(range(1, STEPS + 1))
    assert (run / "checkpoints" / f"step_{STEPS:08d}").is_dir()


def test_the_exit_code_is_that_of_the_command_when_nobody_listens():
    text = "import sys; from attnres_train.__main__ import main; sys.exit(main(['options']))"
    with pipe_without_reader() as pipe:
        code = subprocess.run([sys.executable, "-c", text], stdout=pipe, check=False)
    assert code.returncode == 0
