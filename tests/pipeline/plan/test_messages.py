from __future__ import annotations

from attnres_train.pipeline.plan.layout import make_layout
from attnres_train.pipeline.plan.messages import arriving, channels, leaving
from attnres_train.pipeline.plan.schedule import Action
from attnres_train.pipeline.plan.transport_plan import TransportPlan


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
