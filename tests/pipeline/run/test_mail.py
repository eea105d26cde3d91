from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch

from attnres_train.pipeline.plan.layout import make_layout
from attnres_train.pipeline.plan.messages import Message, PipelineError, arriving
from attnres_train.pipeline.plan.schedule import Action
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.pipeline.run.mail import Inbox, Outbox
from attnres_train.pipeline.run.transport import Mailboxes, MailboxTransport
from attnres_train.pipeline.run.waits import PeerError

PLAN = TransportPlan(make_layout(4, 3, 2, 1))  # the hop carries blocks 0 and 1 and a partial
FIRST, SECOND = (arriving(PLAN, Action("F", 1, micro_batch)) for micro_batch in (0, 1))


class SendLikeGloo:
    """Tells that it is done only to `wait`."""

    def __init__(self, error: bool) -> None:
        self.error, self.waited = error, False

    def is_completed(self) -> bool:
        return self.waited

    def wait(self) -> None:
        if self.error:
            raise RuntimeError("connection closed")
        self.waited = True


class Wire:
    def __init__(self, error: bool = False) -> None:
        self.error, self.works = error, []

    def send(self, channel, tensor):
        self.works.append(SendLikeGloo(self.error))
        return self.works[-1]


def make_inbox(*posted: Message) -> tuple[Inbox, MailboxTransport]:
    transport = MailboxTransport(Mailboxes(timedelta(seconds=0.1)))
    inbox = Inbox(1, transport, lambda _: torch.empty(1), False)
    for message in posted:
        inbox.post(message)
    return inbox, transport


def test_messages_are_taken_in_any_order_and_all_of_them():
    inbox, transport = make_inbox(*FIRST, *SECOND)
    for value, message in enumerate((*FIRST, *SECOND)):
        transport.send(message.channel, torch.tensor([float(value)]))
    assert inbox.take(FIRST[2]).item() == 2
    assert inbox.take(SECOND[0]).item() == 3
    assert inbox.take(FIRST[0]).item() == 0
    with pytest.raises(PipelineError, match=r"rank 1: block 1 for F.chunk 1, .* was never read"):
        inbox.assert_empty()
    for message in (FIRST[1], SECOND[1], SECOND[2]):
        inbox.take(message)
    inbox.assert_empty()


def test_a_wait_in_vain_tells_of_what_and_since_when():
    inbox, _ = make_inbox(*FIRST)
    before = time.time()
    with pytest.raises(PeerError) as error:
        inbox.take(FIRST[0])
    wait = error.value.wait
    assert (wait.direction, wait.tensor, wait.peer, wait.num_bytes) == ("receive", "block 0", 0, 4)
    assert wait.made_by == "F(chunk 0, micro-batch 0)"
    assert wait.needed_by == "F(chunk 1, micro-batch 0)"
    assert before <= wait.since <= time.time() - 0.1
    assert [other.tensor for other in inbox.pending()] == ["block 1", "the partial"]
    assert all(other.since <= wait.since for other in inbox.pending())


def test_sends_are_waited_for_only_when_they_are_overdue():
    wire = Wire()
    outbox = Outbox(0, wire, torch.float32, debug=False)
    for due, message in enumerate(FIRST):
        outbox.send(message, torch.zeros(1), due)
    outbox.reap(1)
    assert [work.waited for work in wire.works] == [True, False, False]
    outbox.reap(1)
    outbox.flush()
    assert all(work.waited for work in wire.works)


def test_a_send_that_is_done_is_let_go_before_it_is_due():
    wire, tensor = Wire(), torch.zeros(1)
    outbox = Outbox(0, wire, torch.float32, debug=False)
    outbox.send(FIRST[0], tensor, due=9)
    wire.works[0].waited = True
    outbox.reap(0)
    wire.works[0].error = True
    outbox.flush()  # would raise if the send were still there


def test_a_peer_that_takes_nothing_is_named():
    outbox = Outbox(0, Wire(error=True), torch.float32, debug=False)
    outbox.send(FIRST[2], torch.zeros(2), due=0)
    outbox.send(FIRST[1], torch.zeros(1), due=0)
    with pytest.raises(PeerError, match=r"rank 0 .*: the partial for F.*, 8 bytes, to rank 1"):
        outbox.flush()
    assert [(other.tensor, other.peer) for other in outbox.pending()] == [("block 1", 1)]
