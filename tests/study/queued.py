"""The queue of a study with the stand-in for training. Loads no torch: a process of it begins at
once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from attnres_train.study.queue import Queue
from attnres_train.study.slots import Slots
from attnres_train.study.study_file import Study, load_study
from attnres_train.supervise.run_lock import run_lock
from attnres_train.supervise.signals import raised


def fake(seconds: float, fails: str = "") -> Callable[[Path], list[str]]:
    script = str(Path(__file__).with_name("fake_trainer.py"))
    return lambda config: [sys.executable, "-S", "-E", script, str(config), str(seconds), fails]


def work(study: Study, seconds: float = 0.0, jobs: int = 2, fails: str = "") -> Queue:
    """As the command does."""
    with raised(), run_lock(study.folder, "study", "study.name"):
        queue = Queue(study, Slots([{}] * jobs, "by a test"), fake(seconds, fails))
        queue.work()
    return queue


def main(path: str, seconds: str) -> None:
    """The same in a process of its own."""
    work(load_study(path), float(seconds))
