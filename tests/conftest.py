from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parity.pool import WorkerPool
from tests.tiny import TinyRuns


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the file that takes longest, which else one process is left with at the end."""
    items.sort(key=lambda item: item.path.name != "test_docs.py")


@pytest.fixture(scope="session")
def pool() -> Iterator[WorkerPool]:
    """Worker processes for whatever needs several ranks: `pool.run(function, ranks, *args)`."""
    workers = WorkerPool()
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, pool: WorkerPool) -> TinyRuns:
    """Trains a tiny configuration: `tiny.train(name, *overrides, ranks=1)` gives the run folder."""
    return TinyRuns(tmp_path_factory.mktemp("tiny"), pool)
