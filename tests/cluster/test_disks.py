"""A disk that fills while data are prepared."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from attnres_train.config import load_config
from attnres_train.data.prepare import prepare
from tests.cluster.disks import on_disk, why_not
from tests.data.tiny import write_text
from tests.tiny import command, write_config


def too_large(folder: Path) -> Path:
    """A config whose corpus makes some 800 KB of tokens in several parts."""
    config = write_config(folder)
    write_text(folder / "corpus", 40, 700)
    return config


@pytest.mark.parametrize("room", [100_000, 500_000])
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
