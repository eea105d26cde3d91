from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from attnres_train.data import token_range
from attnres_train.data.prepare import prepare
from attnres_train.data.token_range import check_vocabulary, token_hashes
from attnres_train.errors import UserError
from tests.data.tiny import run_config, write_indexed


@pytest.mark.parametrize("at_once", [1, 3, 100])
@pytest.mark.parametrize("bad", [9, -1])
def test_the_first_id_outside_is_named_wherever_it_stands(tmp_path, monkeypatch, at_once, bad):
    monkeypatch.setattr(token_range, "AT_ONCE_TOKENS", at_once)
    prefixes = [
        write_indexed(tmp_path / "a", [[0, 4]], np.int32),
        write_indexed(tmp_path / "b", [[1, 2, 3], [4], [0, bad, bad]], np.int32),
    ]
    with pytest.raises(UserError) as caught:
        check_vocabulary(prefixes, 5, "data.corpus.1", tmp_path / "cache" / "seen")
    assert str(caught.value) == (
        f"data.corpus.1 holds token id {bad}, but model.vocab_size is 5: it was tokenised for "
        f"another vocabulary ({tmp_path}/b.bin, first at token 5, in sequence 2)"
    )
    if bad > 0:
        check_vocabulary(prefixes, 10, "data.corpus.1", tmp_path / "cache" / "seen")


def test_a_shard_is_read_once_until_it_changes(tmp_path, monkeypatch):
    prefix, seen = write_indexed(tmp_path / "a", [[1, 2]]), tmp_path / "seen"
    check_vocabulary([prefix], 5, "here", seen)
    with monkeypatch.context() as patch:
        patch.setattr(token_range, "_pieces", lambda prefix: pytest.fail("read again"))
        check_vocabulary([prefix], 5, "here", seen)
        with pytest.raises(UserError), pytest.MonkeyPatch.context() as inner:
            inner.setattr(token_range, "_first_outside", lambda *_: "there")
            check_vocabulary([prefix], 2, "here", seen)  # another vocabulary
    write_indexed(tmp_path / "a", [[1, 7]])
    os.utime(f"{prefix}.bin", ns=(0, 1))
    with pytest.raises(UserError, match="token id 7"):
        check_vocabulary([prefix], 5, "here", seen)
    (seen / "ranges.json").write_text("{")  # cut short by a crash
    with pytest.raises(UserError, match="token id 7"):
        check_vocabulary([prefix], 5, "here", seen)


def test_every_split_is_checked_whichever_document_is_held_out(tmp_path: Path):
    """The bad id once in each document: one of them is held out, and none is trained on."""
    for bad in range(4):
        documents = [[1] * 40 for _ in range(4)]
        documents[bad][7] = 512
        path = write_indexed(tmp_path / f"{bad}", documents)
        corpus = {"kind": "indexed", "path": path}
        config = run_config(tmp_path / "cache", [corpus], {"kind": "none"})
        with pytest.raises(UserError, match=f"token id 512.*in sequence {bad}"):
            prepare(config, progress=False)


def test_hashes_are_kept_with_what_was_found(tmp_path, monkeypatch):
    prefix, seen = write_indexed(tmp_path / "a", [[1, 2], [3]]), tmp_path / "seen"
    check_vocabulary([prefix], 5, "here", seen, hashed=False)
    assert not list(seen.glob("*.hashes"))
    check_vocabulary([prefix], 5, "here", seen)
    found = token_hashes([prefix], seen)
    assert len(found) == 2
    (file,) = seen.glob("*.hashes")
    for damaged in (b"", file.read_bytes()[:8]):
        file.write_bytes(damaged)
        check_vocabulary([prefix], 5, "here", seen)
        assert token_hashes([prefix], seen).tolist() == found.tolist()
    file.unlink()
    check_vocabulary([prefix], 5, "here", seen)
    check_vocabulary([prefix], 5, "here", seen, hashed=False)
    with monkeypatch.context() as patch:
        patch.setattr(token_range, "_pieces", lambda prefix: pytest.fail("read again"))
        check_vocabulary([prefix], 5, "here", seen)
    assert token_hashes([prefix], seen).tolist() == found.tolist()
