"""What the processes of a run tell each other before they have process groups."""

from __future__ import annotations

import json

import pytest
import torch.distributed as dist

from attnres_train.parallel.meeting import PIECE, PREFIX, Meeting, told_beforehand


@pytest.fixture(scope="module")
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def meeting(server: dist.TCPStore, rank: int) -> Meeting:
    store = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    return Meeting(dist.PrefixStore(PREFIX, store), rank, 2, timeout=60, local_rank=rank)


def record(files: int) -> dict[str, list]:
    """As much as `data.record` tells of so many files."""
    return {f"/shared/cache/source_{n:08d}/части.bin": [n, f"{n:064x}"] for n in range(files)}


def test_what_is_told_of_100_000_files_arrives(server):
    """torch's store takes no value of more than 8 MiB."""
    first, second = meeting(server, 0), meeting(server, 1)
    large = record(100_000)
    assert len(json.dumps(large)) > 2**23
    first.tell("prepared", large)
    assert second.hear("prepared", "rank 0 to prepare") == large
    for rank in (first, second):
        rank.tell_own("seen", large if rank is first else None)
    assert first.hear_all("seen", "to look") == [large, None]


@pytest.mark.parametrize("length", [0, 1, PIECE - 3, PIECE - 2, PIECE - 1, 2 * PIECE - 2])
def test_values_of_a_whole_number_of_pieces(server, length):
    first, second = meeting(server, 0), meeting(server, 1)
    first.tell(f"text/{length}", ":" * length)
    assert second.hear(f"text/{length}", "the text") == ":" * length


def test_what_is_told_beforehand_is_heard(server):
    large = record(50_000)
    for key, text in told_beforehand("handed", large).items():
        server.set(key, text)
    server.get(key)  # `set` does not wait for the server
    assert meeting(server, 0).heard("handed") == large
    assert meeting(server, 0).heard("nothing") is None
