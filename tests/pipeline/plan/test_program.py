from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from attnres_train.pipeline.plan.layout import make_layout
from attnres_train.pipeline.plan.messages import leaving
from attnres_train.pipeline.plan.program import LOOK_AHEAD, Message, Program, start_slots
from attnres_train.pipeline.plan.schedule import forward_only, gpipe, one_f_one_b
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from tests.pipeline.plan.layouts import layouts

SCHEDULES = st.sampled_from([one_f_one_b, gpipe, forward_only])


@given(layouts(), st.integers(1, 9), SCHEDULES)
def test_slots_come_after_everything_that_an_action_depends_on(layout, micro_batches, make):
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


def test_what_is_passed_on_goes_at_once_and_what_is_returned_at_last():
    """12 sublayers in blocks of 3 on three ranks: rank 1 passes the embedding and block 1 on, reads
    them, completes block 2, which it reads too, and leaves a partial."""
    plan = TransportPlan(make_layout(6, 3, 3, 1))
    program = Program(plan, one_f_one_b(3, 1, 1), rank=1)
    forward, backward = (
        [
            [("to" if program.sends(m) else "from", m.block) for m in place]
            for place in (step.before, step.inside, step.after)
        ]
        for step in program.steps
    )
    assert forward == [
        [("from", 0), ("to", 0), ("from", 1), ("to", 1), ("from", None)],
        [("to", 2)],
        [("to", None)],
    ]
    assert backward == [
        [("from", None)],
        [("from", 2)],
        [("to", None), ("from", 1), ("to", 1), ("from", 0), ("to", 0)],
    ]


@settings(max_examples=50)
@given(layouts(), st.integers(1, 9), SCHEDULES)
def test_every_message_has_its_place_at_both_ends(layout, micro_batches, make):
    plan = TransportPlan(layout)
    schedule = make(layout.num_ranks, layout.num_virtual_stages, micro_batches)
    programs = [Program(plan, schedule, rank) for rank in range(layout.num_ranks)]
    sent, received = set(), set()
    for program in programs:
        posted: list[Message] = []
        for index, step in enumerate(program.steps):
            posted += step.posted
            near = {near.action for near in program.steps[: index + 1 + LOOK_AHEAD]}
            assert {message.action for message in posted} <= near
            for message in (*step.before, *step.inside, *step.after):
                if program.sends(message):
                    assert message in leaving(plan, step.action) and message not in sent
                    sent.add(message)
                else:
                    assert message.action == step.action
                    assert message in posted and message not in received
                    received.add(message)
        for channel in {message.channel for message in posted}:
            by_sender = schedule[channel.src_rank]
            written = [m for a in by_sender for m in leaving(plan, a) if m.channel == channel]
            assert [m for m in posted if m.channel == channel] == written
    assert sent == received
