"""The queue of a study: its runs, each a process of `attnres-train train`, a few at a time.

What the queue knows is on disk alone (`study.results`), so that it may be ended at any point, by
whatever: started again it goes on. A run whose study was killed trains on; its process holds the
lock of its run, on which the next study waits.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from attnres_train.screen import say
from attnres_train.study import results
from attnres_train.study.results import Result
from attnres_train.study.slots import Slots
from attnres_train.study.study_file import Study, StudyRun
from attnres_train.supervise.run_lock import locked

Command = Callable[[Path], Sequence[str]]
"""What starts the run of a configuration file."""
POLL_SECONDS = 0.2
_TOLD_LINES = 12


def train_command(config: Path) -> list[str]:
    return [sys.executable, "-m", "attnres_train", "train", str(config)]


@dataclass
class Attempt:
    """A run at work: a process of ours, or one that an earlier start of the study has left."""

    run: StudyRun
    process: subprocess.Popen[bytes] | None
    lock: Path

    def ended(self) -> int | None:
        """Its exit code; 0 for a process of which we only know that it is gone."""
        if self.process is not None:
            return self.process.poll()
        return None if _is_held(self.lock) else 0


@dataclass
class Queue:
    study: Study
    slots: Slots
    command: Command = train_command
    waiting: deque[StudyRun] = field(default_factory=deque)
    at_work: dict[int, Attempt] = field(default_factory=dict)
    """By slot."""
    failed: dict[str, str] = field(default_factory=dict)
    """Name of a run to what has happened."""
    done: int = 0

    def work(self) -> None:
        """Have every run of the study end. Those that fail are told, and in `failed`. Whatever is
        raised, runs at work are told to save and waited for."""
        self._look()
        try:
            while self.waiting or self.at_work:
                for slot, environment in enumerate(self.slots.environments):
                    if slot not in self.at_work and self.waiting:
                        self.at_work[slot] = self._start(self.waiting.popleft(), environment)
                time.sleep(POLL_SECONDS)
                self._settle()
        except BaseException:
            self._stop()
            raise

    def _look(self) -> None:
        for run in self.study.runs:
            if results.read_result(self.study, run) is None:
                self.waiting.append(run)
            else:
                results.tidy(self.study, run)
        total = len(self.study.runs)
        self.done = total - len(self.waiting)
        name = self.study.settings.study.name
        say(f"study {name}: {total} runs, {self.done} done; {self.slots.told}")

    def _start(self, run: StudyRun, environment: Mapping[str, str]) -> Attempt:
        lock = self.study.folder / "locks" / f"{run.name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        workers = results.run_folder(self.study, run) / "run.lock"
        with open(lock, "a") as file:
            mine = locked(file)
            if not mine or _is_held(workers):
                say(f"{run.name}: at work already, from before; waiting for it")
                return Attempt(run, None, workers if mine else lock)
            log = results.log_file(self.study, run)
            log.parent.mkdir(parents=True, exist_ok=True)
            # The process inherits the lock: it is held until that ends, whatever becomes of us.
            with open(log, "ab") as screen:
                return Attempt(run, self._process(run, environment, file, screen), lock)

    def _process(
        self, run: StudyRun, environment: Mapping[str, str], lock: IO[str], screen: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command(results.write_config(self.study, run)),
            stdin=subprocess.DEVNULL,
            stdout=screen,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            pass_fds=[lock.fileno()],
            start_new_session=True,  # Ctrl-C is for us: we tell it once
        )

    def _settle(self) -> None:
        for slot, attempt in list(self.at_work.items()):
            code = attempt.ended()
            if code is None:
                continue
            del self.at_work[slot]
            result = results.keep_result(self.study, attempt.run) if code == 0 else None
            if result is not None:
                results.tidy(self.study, attempt.run)
                self.done += 1
                say(f"[{self.done}/{len(self.study.runs)}] {told(self.study, attempt.run, result)}")
            elif attempt.process is None:  # the orphan was stopped: its run goes on
                self.waiting.append(attempt.run)
            else:
                self._fail(attempt.run, code)

    def _fail(self, run: StudyRun, code: int) -> None:
        log = results.log_file(self.study, run)
        how = f"exit code {code}" if code else "ended before its last step"
        self.failed[run.name] = f"{how}, {results.reached(self.study, run)}"
        text = log.read_text(encoding="utf-8", errors="replace")
        lines = "\n  ".join(text.splitlines()[-_TOLD_LINES:])
        say(f"{run.name} FAILED ({self.failed[run.name]}); the end of {log}:\n  {lines}")

    def _stop(self) -> None:
        """Have runs at work save and end. Told again meanwhile, tell them again: they then leave
        without."""
        while True:
            try:
                ours = [one.process for one in self.at_work.values() if one.process is not None]
                for process in ours:
                    process.terminate()
                if ours:
                    say(f"{len(ours)} runs save and end; the same command goes on")
                for process in ours:
                    process.wait()
                return
            except KeyboardInterrupt:
                continue


def _is_held(lock: Path) -> bool:
    """Whether another process has ``lock``."""
    if not lock.exists():
        return False
    with open(lock, "a") as file:
        return not locked(file)


def told(study: Study, run: StudyRun, result: Result) -> str:
    """A run that has ended, in a line."""
    metric = study.settings.report.metric
    curve = result["curves"].get(metric)
    value = f"{metric} {curve[-1][1]}" if curve else f"loss {result['training_loss'][-1][1]}"
    seconds = result["times"]["seconds"]
    return f"{run.name}: {value} after {result['steps']} steps, {seconds:.0f} s in steps"
