from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from attnres_train.pipeline.plan.messages import Channel
from attnres_train.pipeline.run.transport import Mailboxes, MailboxTransport, P2PTransport

THERE, BACK = Channel(0, 1, "F"), Channel(1, 0, "F")
GRADIENTS = Channel(0, 1, "B")


def test_mailboxes_keep_the_order_of_a_channel_and_copy():
    mailboxes = Mailboxes(timedelta(seconds=1))
    sender, receiver = MailboxTransport(mailboxes), MailboxTransport(mailboxes)
    tensor = torch.arange(3.0)
    for channel, factor in [(THERE, 1), (GRADIENTS, 2), (THERE, 3)]:
        sender.send(channel, tensor * factor).wait()
    sent = sender.send(THERE, tensor)
    assert sender.bytes_sent == 4 * tensor.nbytes
    assert receiver.bytes_sent == 0
    tensor.zero_()

    buffers = [torch.empty(3) for _ in range(4)]
    works = [
        receiver.receive(c, b)
        for c, b in zip([THERE, THERE, GRADIENTS, THERE], buffers, strict=True)
    ]
    assert not works[0].is_completed()
    for work in reversed(works):  # what counts is the order of the receives, not of the waits
        work.wait()
    sent.wait()
    assert works[0].is_completed()
    assert [buffer[2].item() for buffer in buffers] == [2, 6, 4, 2]
    assert mailboxes.is_empty()


def test_mailboxes_time_out_and_close():
    mailboxes = Mailboxes(timedelta(seconds=0.05))
    transport = MailboxTransport(mailboxes)
    with pytest.raises(RuntimeError, match="nothing arrived"):
        transport.receive(THERE, torch.empty(1)).wait()
    mailboxes.close()
    with pytest.raises(RuntimeError, match="a peer failed"):
        transport.receive(THERE, torch.empty(1)).wait()


def cross_traffic() -> tuple[list[float], int]:
    """Two pipelines of two ranks, tensors of two sizes and types, receives in another order."""
    pipelines = [(0, 2), (1, 3)]
    transport = P2PTransport([THERE, BACK, GRADIENTS], pipelines, timedelta(seconds=300))
    pipeline, stage = dist.get_rank() % 2, dist.get_rank() // 2
    large, small = torch.full((70_000,), 1.0 + pipeline), torch.full((2,), 7.0 + pipeline)
    received = [torch.empty(70_000), torch.empty(2), torch.empty(3, dtype=torch.bfloat16)]
    if stage == 0:
        works = [
            transport.send(GRADIENTS, large),
            transport.send(THERE, small),
            transport.receive(BACK, received[2]),
        ]
    else:
        works = [
            transport.receive(THERE, received[1]),
            transport.receive(GRADIENTS, received[0]),
            transport.send(BACK, torch.full((3,), 0.5, dtype=torch.bfloat16)),
        ]
    for work in works:
        work.wait()
    mine = received[:2] if stage else received[2:]
    return [tensor.float().mean().item() for tensor in mine], transport.bytes_sent


def test_channels_over_gloo_carry_every_pipeline_separately(pool):
    sent = 70_000 * 4 + 2 * 4
    assert pool.run(cross_traffic, 4) == [
        ([0.5], sent),
        ([0.5], sent),
        ([1.0, 7.0], 6),
        ([2.0, 8.0], 6),
    ]


def wait_in_vain() -> str:
    """Rank 1 waits for a tensor that never leaves; rank 0 stays until it has given up."""
    transport = P2PTransport([THERE], [(0, 1)], timedelta(seconds=2))
    message = ""
    if dist.get_rank() == 1:
        with pytest.raises(RuntimeError) as error:
            transport.receive(THERE, torch.empty(1)).wait()
        message = str(error.value)
    dist.monitored_barrier()
    return message


def test_the_groups_have_the_timeout(pool):
    assert "imed out" in pool.run(wait_in_vain, 2)[1]
