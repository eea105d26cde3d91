"""Several machines start together, or are told why not before step 1."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from attnres_train.config.schema import RunConfig
from attnres_train.data.loader import open_data
from attnres_train.data.prepare import prepare
from attnres_train.data.record import as_record, files_of, from_record, is_here, missing
from attnres_train.errors import UserError
from attnres_train.parallel.meeting import Meeting, meet, of_ranks
from attnres_train.runs import start
from attnres_train.runs.preparation import prepare_stages
from tests.data.tiny import run_config, text_corpus, write_text
from tests.machines import own_machine
from tests.tiny import free_port

Edits = tuple[tuple[int, str, bytes], ...]
"""Files that a rank writes before it looks at the data: rank, path, content."""


def config(run_dir: str | Path, cache: str | Path, texts: str | Path) -> RunConfig:
    made = run_config(Path(cache), [text_corpus(Path(texts))])
    made.run.dir = str(run_dir)
    return made


def begin(config: RunConfig, folder: Path, port: int, edits: Edits = ()) -> tuple[Any, int]:
    """On every rank: the start of a run, up to step 1. Gives the tokens of a batch, or the error's
    text, and how often this rank has prepared."""
    with ExitStack() as stack:
        stack.enter_context(own_machine(folder, port))
        prepares = stack.enter_context(patch.object(start, "prepare_stages", wraps=prepare_stages))
        stack.enter_context(patch.object(start, "SEEN_SECONDS", 0.1))
        try:
            with meet(300) as meeting:
                begun = start.prepare_together(config, meeting)
                assert isinstance(begun, start.Start)
                run = Path(config.run.dir, config.run.name)
                if meeting.rank == 0:
                    run.mkdir(parents=True, exist_ok=True)
                for rank, path, content in edits:
                    if rank == meeting.rank:
                        Path(path).write_bytes(content)
                start.check_together(run, begun, meeting)
                tokens = open_data(config, begun.prepared[0]).micro_batches(0, 0, 1)[0]["tokens"]
                meeting.tell_own("end", 0)
                if meeting.rank == 0:  # the store goes with it
                    meeting.hear_all("end", "to end")
        except UserError as error:
            return str(error), prepares.call_count
        return tokens.tolist(), prepares.call_count


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_text(tmp_path / "texts", 12)


def test_one_machine_prepares_for_all_that_see_its_cache(pool, tmp_path, texts):
    whole = config(tmp_path / "runs", tmp_path / "cache", texts)
    found = pool.run(begin, 3, whole, tmp_path, free_port())
    tokens = {json.dumps(tokens) for tokens, _ in found}
    assert len(tokens) == 1 and tokens.pop().startswith("[[")
    assert [count for _, count in found] == [1, 0, 0]
    assert not list((tmp_path / "runs" / "run").glob(".*"))


def test_a_machine_with_a_cache_of_its_own_prepares_what_it_lacks(pool, tmp_path, texts):
    apart = config(tmp_path / "runs", "cache", texts)
    found = pool.run(begin, 2, apart, tmp_path, free_port())
    assert found[0][0] == found[1][0] and found[0][0][0]
    assert [count for _, count in found] == [1, 1]
    again = pool.run(begin, 2, apart, tmp_path, free_port())
    assert again == [found[0], (found[1][0], 0)], "it has all that rank 0 has"


def test_a_run_folder_that_is_not_shared_is_refused_by_the_name_of_the_machine(
    pool, tmp_path, texts
):
    for told, _ in pool.run(begin, 3, config("runs", "cache", texts), tmp_path, free_port()):
        assert told == (
            "run.dir: runs/run is not the folder that rank 0 sees under that name: set run.dir to "
            "a folder that all machines of the run share (on node1, node2: ranks 1-2)"
        )
    assert not (tmp_path / "node1" / "runs").exists()


def test_machines_with_other_texts_are_told_apart(pool, tmp_path):
    for number, first in enumerate((0, 50)):
        write_text(tmp_path / f"node{number}" / "texts", 12, first=first)
    for told, _ in pool.run(
        begin, 2, config(tmp_path / "runs", "cache", "texts"), tmp_path, free_port()
    ):
        assert "machine node1 has other data than machine node0: data.corpus.0 differs" in told


def test_what_fails_on_one_rank_ends_all_with_its_text(pool, tmp_path):
    for told, _ in pool.run(begin, 2, config("runs", "cache", "texts"), tmp_path, free_port()):
        assert told.startswith("data.corpus.0.path") and "rank" not in told
    write_text(tmp_path / "node0" / "texts", 12)
    wanted = config(tmp_path / "runs", "cache", "texts")
    for rank, (told, _) in enumerate(pool.run(begin, 2, wanted, tmp_path, free_port())):
        assert told.startswith("rank 1 on node1: " * (1 - rank) + "data.corpus.0.path")


def test_checkpoints_that_one_rank_cannot_write(pool, tmp_path, texts):
    """The second machine has a file where checkpoints go."""
    shared = tmp_path / "runs" / "run"
    (tmp_path / "node1" / "runs").mkdir(parents=True)
    (tmp_path / "node1" / "runs" / "run").symlink_to(shared)
    edits = ((0, str(shared / "checkpoints"), b""),)
    for told, _ in pool.run(
        begin, 2, config(tmp_path / "runs", tmp_path / "cache", texts), tmp_path, free_port(), edits
    ):
        assert told == (
            f"run.dir: checkpoints cannot be written to {shared}/checkpoints: "
            f"{shared}/checkpoints is a file (on node0, node1: ranks 0-1)"
        )


def test_a_file_of_the_data_that_one_rank_sees_otherwise(pool, tmp_path, texts):
    apart = config(tmp_path / "runs", "cache", texts)
    pool.run(begin, 2, apart, tmp_path, free_port())
    (bin_,) = (path for path in (tmp_path / "node1").rglob("*.bin"))
    name, size = str(bin_.relative_to(tmp_path / "node1")), bin_.stat().st_size
    edits = ((1, name, b"short"),)
    for told, _ in pool.run(begin, 2, apart, tmp_path, free_port(), edits):
        assert told == f"{name} has 5 bytes, where rank 0 has {size:,} (on node1: rank 1)"


def test_a_record_is_read_as_it_was_written(tmp_path, texts):
    prepared = prepare(config(tmp_path, tmp_path / "cache", texts), progress=False)
    record = json.loads(json.dumps(as_record(prepared)))
    assert from_record(record) == prepared
    assert is_here(record) and missing(record) == []
    index, tokens, *_ = files_of(prepared)
    content = tokens.read_bytes()
    tokens.write_bytes(content[:-1] + b"?")  # of the same size
    assert not is_here(record) and missing(record) == []
    tokens.write_bytes(content)
    index.unlink()
    assert not is_here(record)
    assert missing(record) == [f"{index} cannot be read (No such file or directory)"]
    for file in files_of(prepared)[1:]:
        file.write_bytes(b"")
    assert len(missing(record)) == 4 and missing(record)[-1].endswith("missing or differ")


def late(rank: int, timeout: float) -> Meeting:
    return Meeting(dist.HashStore(), rank, 4, timeout, machine="node0", local_rank=0)


def test_who_does_not_come_is_named():
    meeting = late(0, timeout=0.2)
    meeting.tell_own("place", 0)
    with pytest.raises(UserError, match=r"after 0.2 s on node0, still waiting for ranks 1-3 to j"):
        meeting.hear_all("place", "to join")
    names = ["a", "a", "b", "c"]
    with pytest.raises(UserError, match=r"waiting for ranks 1-3 on a, b, c to look: run\.start"):
        meeting.hear_all("place", "to look", names)
    with pytest.raises(UserError, match=r"waiting for rank 0 to prepare"):
        late(3, timeout=0.2).hear("prepared", "rank 0 to prepare")


def test_a_failure_that_is_no_users_is_that_of_a_peer():
    one, other = late(3, timeout=300), late(2, timeout=300)
    other.store = one.store
    one.tell_failure(ZeroDivisionError("division by zero"))
    other.tell_failure(UserError("later"))
    with pytest.raises(RuntimeError, match="remote process exited: rank 3 on node0 failed: Zero"):
        other.hear("prepared", "rank 0 to prepare")


def test_many_ranks_in_few_words():
    assert of_ranks([7]) == "rank 7"
    assert of_ranks([3, 0, 1, 2, 9, 5]) == "ranks 0-3, 5, 9"
    assert of_ranks(range(0, 40, 2)).endswith(", 14 and 12 more")
