from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from attnres_train.pipeline.layout import make_layout
from attnres_train.pipeline.messages import Program, arriving, channels, leaving, start_slots
from attnres_train.pipeline.plan import TransportPlan
from attnres_train.pipeline.schedule import Action, forward_only, gpipe, one_f_one_b
from tests.pipeline.layouts import layouts

SCHEDULES = st.sampled_from([one_f_one_b, gpipe, forward_only])


def test_held_blocks_lead_forward_and_their_gradients_trail_backward():
    plan = TransportPlan(make_layout(8, 3, 4, 1))  # block ends 3, 6, ...; chunks of 4 sublayers
    forward = leaving(plan, Action("F", 1, 5))
    assert [(m.is_held, m.block) for m in forward] == [
        (True, 0),
        (True, 1),
        (False, 2),
        (False, None),
    ]
    assert {m.action for m in forward} == {Action("F", 2, 5)}
    backward = leaving(plan, Action("B", 2, 5))
    assert [m.block for m in backward] == [m.block for m in reversed(forward)]
    assert {m.channel for m in backward} == {(2, 1, "B")}
    assert [str(m) for m in (forward[0], backward[0])] == [
        "block 0 for F(chunk 2, micro-batch 5)",
        "the gradient of the partial for B(chunk 1, micro-batch 5)",
    ]


def test_both_ends_agree_and_nothing_is_sent_within_a_rank():
    plan = TransportPlan(make_layout(8, 3, 2, 2))
    for chunk in range(1, 4):
        assert arriving(plan, Action("F", chunk, 0)) == leaving(plan, Action("F", chunk - 1, 0))
        assert arriving(plan, Action("B", chunk - 1, 0)) == leaving(plan, Action("B", chunk, 0))
    local = TransportPlan(make_layout(8, 3, 1, 4))
    assert not channels(local)
    assert not arriving(local, Action("F", 1, 0))


def test_channels_are_those_that_some_hop_uses():
    plan = TransportPlan(make_layout(4, 2, 3, 1))
    assert channels(plan) == [(0, 1, "F"), (1, 0, "B"), (1, 2, "F"), (2, 1, "B")]


@settings(deadline=None)
@given(layouts(), st.integers(1, 9), SCHEDULES)
def test_slots_come_behind_everything_that_an_action_depends_on(layout, micro_batches, make):
    schedule = make(layout.num_ranks, layout.num_virtual_stages, micro_batches)
    slots = start_slots(schedule, layout.num_chunks)
    assert slots.keys() == {action for actions in schedule for action in actions}
    for actions in schedule:
        for before, action in pairwise(actions):
            assert slots[before] < slots[action]
    for action, slot in slots.items():
        kind, chunk, _ = action
        causes = [action._replace(chunk=chunk + (-1 if kind == "F" else 1))]
        causes += [action._replace(kind="F")] if kind == "B" else []
        assert all(slots[cause] < slot for cause in causes if cause in slots and cause != action)


@settings(deadline=None, max_examples=50)
@given(layouts(), st.integers(1, 9), SCHEDULES)
def test_every_rank_reads_each_channel_as_it_is_written(layout, micro_batches, make):
    """So receives are posted in the sender's order without ever running far ahead."""
    plan = TransportPlan(layout)
    schedule = make(layout.num_ranks, layout.num_virtual_stages, micro_batches)
    programs = [Program(plan, schedule, rank) for rank in range(layout.num_ranks)]
    written = [m for program in programs for step in program.steps for m in step.leaving]
    read = [m for program in programs for step in program.steps for m in step.arriving]
    assert sorted(map(str, written)) == sorted(map(str, read))
    for program in programs:
        for channel, expected in program.arrivals.items():
            reads = [m for step in program.steps for m in step.arriving if m.channel == channel]
            assert reads == expected
