from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from attnres_train.supervise.signals import STOP_SIGNALS
from tests.parity.pool import WorkerPool
from tests.tiny import TinyRuns

# No example has a deadline and no generator has to be quick: the machine may be busy. CI sees the
# same examples each time, so that a failure there comes from the change; elsewhere they vary.
settings.register_profile(
    "house",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,
    print_blob=True,
)
settings.load_profile("house")


def pytest_configure() -> None:
    """Hear signals as a terminal's processes do: a shell has those that it starts in the background
    (``&``, nohup) ignore some, and so all that tests start would."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) == signal.SIG_IGN:
            is_interrupt = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_interrupt else signal.SIG_DFL)


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
