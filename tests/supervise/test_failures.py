"""What ranks write down when they fail, and which rank that shows to be the cause."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnres_train.errors import UserError
from attnres_train.pipeline.plan.messages import Message
from attnres_train.pipeline.plan.program import Program, Step
from attnres_train.pipeline.plan.schedule import gpipe, one_f_one_b
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.pipeline.run.waits import PeerError, Wait
from attnres_train.supervise import failures
from attnres_train.supervise.board import Board
from attnres_train.supervise.culprit import Failure, chain, explain
from attnres_train.supervise.recorder import Recorder
from attnres_train.supervise.run_lock import owned, run_lock
from tests.pipeline.plan.layouts import layouts
from tests.supervise.hanging import TIMEOUT, train_beside_a_sleeper


def waits_for(peer: int, since: float, direction: str = "receive") -> Wait:
    return Wait(direction, f"block {peer}", f"F({peer})", "F(next)", peer, 64, since)


def silent(rank: int, peer: int | None, since: float, time: float) -> Failure:
    waiting = None if peer is None else waits_for(peer, since)
    return Failure(rank, time, "RuntimeError: Timed out waiting 3000ms", waiting)


def test_a_chain_ends_where_nobody_is_waited_for_or_where_it_was():
    assert chain({0: 1, 1: 2}, 0) == [0, 1, 2]
    assert chain({0: 1, 1: 2, 2: 1}, 0) == [0, 1, 2, 1]
    assert chain({}, 5) == [5]


@settings(max_examples=50)
@given(layouts(), st.integers(1, 6), st.sampled_from([one_f_one_b, gpipe]), st.data())
def test_wherever_a_rank_hangs_every_wait_leads_to_it(layout, micro_batches, make, data):
    schedule = make(layout.num_ranks, layout.num_virtual_stages, micro_batches)
    plan = TransportPlan(layout)
    programs = [Program(plan, schedule, rank) for rank in range(layout.num_ranks)]
    sleeper = data.draw(st.integers(0, layout.num_ranks - 1))
    asleep_in = data.draw(st.sampled_from(programs[sleeper].steps))
    waits_for = who_waits_for_whom(programs, sleeper, asleep_in)
    assert {chain(waits_for, rank)[-1] for rank in waits_for} <= {sleeper}
    assert sleeper not in waits_for


def who_waits_for_whom(programs: list[Program], sleeper: int, asleep_in: Step) -> dict[int, int]:
    """Which rank waits for which once rank ``sleeper`` has fallen asleep in the pass of a step."""
    sent: set[Message] = set()

    def run(program: Program) -> Iterator[int | None]:
        for step in program.steps:
            for message in (*step.before, None, *step.inside, *step.after):
                while message is None and program.rank == sleeper and step is asleep_in:
                    yield None
                if message is not None and program.sends(message):
                    sent.add(message)
                while message is not None and message not in sent:
                    yield message.channel.src_rank

    runs, waits, before = [run(program) for program in programs], [], -1
    while before < len(sent):
        before = len(sent)
        waits = [next(run, None) for run in runs]
    return {rank: peer for rank, peer in enumerate(waits) if peer is not None}


def test_the_rank_that_waits_for_nobody_is_to_blame():
    told = explain([silent(0, 1, 12, 22), silent(1, 2, 11, 21), silent(3, 2, 10, 20)], 4)
    assert told == (
        "rank 2 stopped the run: "
        "rank 1 waited since 00:00:11 UTC for block 2 for F(next), 64 bytes, from rank 2 in F(2); "
        "rank 3 waited since 00:00:10 UTC for block 2 for F(next), 64 bytes, from rank 2 in F(2); "
        "rank 0 waited in turn"
    )


def test_a_rank_that_does_not_take_what_is_sent_is_to_blame():
    stuck = Failure(0, 20, "PeerError: timed out", waits_for(1, 10, "send"))
    assert explain([stuck], 2) == (
        "rank 1 stopped the run: rank 0 waited since 00:00:10 UTC for block 1 for F(next), "
        "64 bytes, to rank 1"
    )


def test_what_a_rank_waits_for_after_the_first_failure_excuses_it_not():
    """It woke up, and found its peers gone."""
    late = Failure(2, 31, "PeerError: Connection closed by peer", waits_for(3, 30))
    told = explain([silent(1, 2, 11, 21), late, silent(3, 2, 10, 20)], 4)
    assert told.startswith("rank 2 stopped the run")
    assert told.endswith("\nrank 2: PeerError: Connection closed by peer")


def test_ranks_that_wait_for_each_other_have_lost_a_tensor():
    told = explain([silent(0, 1, 10, 20), silent(1, 2, 11, 21), silent(2, 1, 12, 22)], 3)
    assert told.startswith("ranks 1, 2 waited for each other, a tensor was lost on the way: rank 1")


def test_a_rank_that_is_missing_in_an_operation_of_all_is_to_blame():
    told = explain([silent(rank, None, 0, 20) for rank in (0, 1, 3)], 4)
    assert told.startswith("rank 2 did not join an operation of all ranks")
    assert explain([silent(rank, None, 0, 20) for rank in range(4)], 4) is None


def test_other_pipelines_wait_in_an_operation_of_all():
    """Two pipelines of two ranks: 2 and 3 are through, and wait to average their gradients."""
    through = [silent(rank, None, 0, time=19) for rank in (2, 3)]
    told = explain([silent(0, 1, since=10, time=20), *through], 4)
    assert told.startswith("rank 1 stopped the run: rank 0 waited since 00:00:10 UTC")


def test_silence_after_another_failure_explains_nothing():
    assert explain([], 2) is None
    crash = Failure(2, 15, "ValueError: the cause")
    assert explain([crash, silent(1, 2, 11, 21)], 3) is None


def test_four_ranks_of_which_one_hangs(pool, tmp_path):
    notes = pool.run(fail_beside_a_sleeper, 4, tmp_path)
    assert notes[2] == []  # found its peers gone
    for rank in (0, 1, 3):
        (note,) = notes[rank]
        assert note.startswith("rank 2 stopped the run: rank 1 waited since ")
        assert " from rank 2 in F(chunk 2, micro-batch 1); rank 0 waited in turn" in note

    records = {path.name: json.loads(path.read_text()) for path in failures.paths(tmp_path)}
    assert sorted(records) == [f"rank_{rank:04d}.json" for rank in range(4)]
    third = records["rank_0003.json"]
    assert "Timed out waiting 3000ms" in third["error"]
    assert third["waiting"] | {"since": ""} == {
        "direction": "receive",
        "tensor": "block 3",  # what rank 2 had before it has passed on
        "made_by": "F(chunk 2, micro-batch 1)",
        "needed_by": "F(chunk 3, micro-batch 1)",
        "peer": 2,
        "num_bytes": 2 * 3 * 8 * 8,
        "since": "",
    }
    since, until = map(datetime.fromisoformat, (third["waiting"]["since"], third["time"]))
    assert until - since >= TIMEOUT
    assert {wait["direction"] for wait in third["pending"]} == {"receive", "send"}
    assert {wait["peer"] for wait in records["rank_0001.json"]["pending"]} == {0, 2}


def fail_beside_a_sleeper(folder: Path) -> list[str]:
    """The notes that this rank's exception carries."""
    with pytest.raises(PeerError) as error:
        train_beside_a_sleeper(2, seconds=7.5, folder=folder)
    return getattr(error.value, "__notes__", [])


def test_records_are_read_as_they_were_written(tmp_path):
    failure = Failure(3, 20.25, "why", waits_for(1, 10.5), [waits_for(2, 9.125)])
    failures.write(tmp_path, failure)
    failures.write(tmp_path, Failure(0, 1.0, "x"))
    assert failures.read(tmp_path) == [Failure(0, 1.0, "x"), failure]
    failures.clear(tmp_path)
    assert failures.read(tmp_path) == []


def test_peers_are_told_by_their_global_rank(tmp_path):
    error = PeerError(1, waits_for(0, time.time()))
    error.pending = [waits_for(2, time.time())]
    with pytest.raises(PeerError), Recorder(Board(tmp_path, 5), (4, 5, 6), 8).recorded():
        raise error
    (record,) = failures.read(tmp_path)
    assert (record.rank, record.waiting.peer, record.pending[0].peer) == (5, 4, 6)


def test_what_the_user_has_to_mend_leaves_no_record(tmp_path):
    with pytest.raises(UserError), Recorder(Board(tmp_path, 0), (0,), 1).recorded():
        raise UserError("no data")
    assert failures.read(tmp_path) == []


def test_only_rank_0_takes_the_run_folder(tmp_path, monkeypatch):
    failures.write(tmp_path, silent(1, 0, since=1, time=2))
    with run_lock(tmp_path):
        with pytest.raises(UserError, match="is in use by process"), owned(tmp_path):
            pytest.fail("two runs in one folder")
        monkeypatch.setenv("RANK", "1")
        with owned(tmp_path):
            assert failures.paths(tmp_path)
    monkeypatch.setenv("RANK", "0")
    with owned(tmp_path):
        assert not failures.paths(tmp_path)
