"""A corpus of thousands of shards: looked through by the process that prepares, and by no other;
few of its files are open at a time."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest

from attnres_train.data import indexed
from attnres_train.data.indexed import MAX_OPEN_SHARDS, TokenSequences, check_indexed, num_sequences
from attnres_train.data.loader import open_data
from attnres_train.data.prepare import prepare
from attnres_train.errors import UserError
from tests.data.tiny import run_config, write_indexed


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
@pytest.mark.nightly
def test_2000_shards_under_the_usual_limit(tmp_path, monkeypatch):
    prefixes = [
        write_indexed(tmp_path / f"{number:04d}", [[number % 500] * 4, [1, 2, 3]])
        for number in range(2000)
    ]
    config = run_config(
        tmp_path / "cache",
        [{"kind": "indexed", "path": prefixes}],
        {"kind": "none"},
        train__eval_interval=1,
    )
    limit, before = resource.getrlimit(resource.RLIMIT_NOFILE), open_files()
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limit[1]))
    try:
        prepared = prepare(config, progress=False)

        def never(prefix: str) -> None:
            raise AssertionError("looked through again")

        monkeypatch.setattr(indexed, "check_indexed", never)
        data, seen = open_data(config, prepared), set()
        for step in range(150):
            for batch in data.micro_batches(4 * step, 0, 1) + data.validation_batches(step, 0, 1):
                seen |= set(batch["tokens"].flatten().tolist())
        held = open_files() - before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert prepared.sources[0].prefixes == prefixes and len(seen) > 400
    assert MAX_OPEN_SHARDS < held <= 2 * MAX_OPEN_SHARDS + 16


def test_what_was_found_good_is_not_read_again(tmp_path):
    prefix = write_indexed(tmp_path / "a", [[1, 2, 3], [4], [5, 6]])
    assert num_sequences(prefix) == check_indexed(prefix).num_sequences == 3
    idx = Path(f"{prefix}.idx")
    lengths = np.memmap(idx, np.int32, "r+", indexed.HEADER.size, (3,))
    lengths[1] = -1  # in the middle: it would be found by reading
    del lengths
    with pytest.raises(UserError, match="length -1"):
        check_indexed(prefix)
    assert num_sequences(prefix) == 3


def test_files_that_were_cut_short_since_are_told(tmp_path):
    prefix = write_indexed(tmp_path / "a", [[1, 2, 3], [4], [5, 6]])
    for name, end in (("a.bin", 11), ("a.idx", 60), ("a.idx", 20)):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:end])
        with pytest.raises(UserError, match=f"{name} is truncated: expected .* found {end}"):
            TokenSequences([prefix])
        write_indexed(tmp_path / "a", [[1, 2, 3], [4], [5, 6]])
    (tmp_path / "a.bin").unlink()
    with pytest.raises(UserError, match="there is no file"):
        TokenSequences([prefix])
