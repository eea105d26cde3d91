"""All ranks of a pipeline in one process: a thread for each, mailboxes between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from datetime import timedelta
from typing import Any, TypeVar

from attnres_train.pipeline.run.transport import Mailboxes, MailboxTransport, Transport
from attnres_train.pipeline.run.waits import PeerError

Result = TypeVar("Result")


def run_ranks(
    num_ranks: int,
    function: Callable[[int, Transport], Result],
    *,
    wrap: Callable[[int, Transport], Transport] = lambda rank, transport: transport,
    timeout: float = 300,
) -> list[Result]:
    """``function(rank, transport)`` on every rank; raises the fault rather than its echoes.

    ``wrap`` may put something between a rank and its transport. ``timeout``: seconds that a rank
    waits for a tensor, at most.
    """
    mailboxes = Mailboxes(timedelta(seconds=timeout))
    with ThreadPoolExecutor(num_ranks) as pool:
        futures = [
            pool.submit(function, rank, wrap(rank, MailboxTransport(mailboxes)))
            for rank in range(num_ranks)
        ]
        wait(futures, return_when=FIRST_EXCEPTION)
        mailboxes.close()
        errors = [error for future in futures if (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, PeerError)):
        raise error
    assert mailboxes.is_empty()
    return [future.result() for future in futures]


def first_of(values: Sequence[Any]) -> Any:
    """The one that is not None."""
    (value,) = [value for value in values if value is not None]
    return value
