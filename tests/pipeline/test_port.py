from __future__ import annotations

import heapq
from itertools import count

import pytest

from attnres_train.pipeline.port import Message, Port
from attnres_train.pipeline.schedule import Action


def run(sends: list[tuple[float, Message]], unit_seconds: float) -> list[tuple]:
    """(urgent, units, start, end) of every stretch that leaves the port."""
    events, sequence, sent = [], count(), []

    def at(time, event):
        heapq.heappush(events, (time, next(sequence), event))

    port = Port(0, unit_seconds, at, sent.append)
    for time, message in sends:
        at(time, lambda now, message=message: port.send(message, now))
    while events:
        time, _, event = heapq.heappop(events)
        event(time)
    return [(t.urgent, t.units, t.start, t.end) for t in sent]


def message(urgent: bool, units: int) -> Message:
    return Message(1, Action("F", 1, 0), urgent, units)


def test_urgent_units_cut_into_a_message_behind_the_unit_on_the_wire():
    sends = [(0.0, message(False, 4)), (1.5, message(True, 2))]
    assert run(sends, 1.0) == [(False, 2, 0, 2), (True, 2, 2, 4), (False, 2, 4, 6)]


def test_an_urgent_message_overtakes_those_that_wait():
    sends = [(0.0, message(True, 1)), (0.1, message(False, 3)), (0.2, message(True, 2))]
    assert run(sends, 1.0) == [(True, 1, 0, 1), (True, 2, 1, 3), (False, 3, 3, 6)]


def test_the_last_unit_of_a_message_is_not_cut():
    sends = [(0.0, message(False, 2)), (1.5, message(True, 1))]
    assert run(sends, 1.0) == [(False, 2, 0, 2), (True, 1, 2, 3)]


@pytest.mark.parametrize("unit_seconds", [0.0, 0.25])
def test_messages_of_one_kind_keep_their_order(unit_seconds):
    sends = [(0.0, message(True, 1)), (0.0, message(True, 2)), (0.0, message(True, 3))]
    assert [units for _, units, _, _ in run(sends, unit_seconds)] == [1, 2, 3]
