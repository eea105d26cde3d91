from __future__ import annotations

import json
import multiprocessing

import pytest

from attnres_train.data.cache import digest, locked, published, write_json
from attnres_train.errors import UserError

SECONDS = 300  # on a busy machine; a few are enough otherwise


def test_digest_depends_on_values_and_not_on_key_order():
    assert digest({"a": 1, "b": [2, None]}) == digest({"b": [2, None], "a": 1})
    assert digest([1]) != digest([2])


def test_published_appears_only_when_complete(tmp_path):
    folder = tmp_path / "result"
    with pytest.raises(RuntimeError), published(folder) as scratch:
        (scratch / "half").write_text("x")
        raise RuntimeError
    assert not folder.exists()
    with published(folder) as scratch:
        assert not list(scratch.iterdir()), "an interrupted attempt is thrown away"
        (scratch / "whole").write_text("x")
        assert not folder.exists()
    assert [file.name for file in folder.iterdir()] == ["whole"]
    assert [file.name for file in tmp_path.iterdir()] == ["result"]


def test_published_replaces(tmp_path):
    for content in "ab":
        with published(tmp_path / "result") as scratch:
            (scratch / content).write_text(content)
    assert [file.name for file in (tmp_path / "result").iterdir()] == ["b"]


def test_write_json_leaves_no_scratch_file(tmp_path):
    path = tmp_path / "deep" / "record.json"
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]


def _hold(folder, held, may_end):
    with locked(folder, print):
        held.set()
        may_end.wait()
        (folder / "done").touch()


def test_second_run_waits_for_the_first_and_says_so(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, may_end = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, held, may_end), daemon=True)
    other.start()
    assert held.wait(SECONDS)
    told = []

    def tell(text):
        told.append(text)
        may_end.set()

    with locked(tmp_path, tell):
        assert (tmp_path / "done").exists()
    other.join()
    assert told == [f"waiting for another run that prepares data in {tmp_path}"]


def test_a_dead_holder_leaves_no_lock(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, never = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, held, never), daemon=True)
    other.start()
    assert held.wait(SECONDS)
    other.kill()
    other.join()
    told = []
    with locked(tmp_path, told.append):
        assert told == []


def test_a_cache_that_is_a_file(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with (
        pytest.raises(UserError, match=r"data\.cache_dir .* cannot be written"),
        locked(file, print),
    ):
        pass
