from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parity.pool import WorkerPool


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Worker processes for whatever needs several ranks: `pool.run(function, ranks, *args)`."""
    workers = WorkerPool()
    yield workers
    workers.close()
