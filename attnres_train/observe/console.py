"""The run as a person reads it: one line per interval, and a progress bar on a terminal."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Sequence

from tqdm import tqdm

from attnres_train.observe.observer import Observer, Record, Sample
from attnres_train.screen import Forgiving, complain, say

COLUMNS = 100
"""No line is longer: what does not fit goes on, indented, on the next one."""
RECENT_STEPS = 64
"""The time that is left is told by what so many of the last steps took."""


class Console(Observer):
    """Prints a line every ``log.interval`` steps; rates are averages since the last line,
    validation and saving left out. A line that cannot be printed is lost, not the run."""

    after_save = True

    def on_start(self, step: int) -> None:
        train, log = self.run.config.train, self.run.config.log
        self.interval, self.total = log.interval, self.run.config.total_iters
        self.end = min(self.total, train.stop_after or self.total)
        wanted = {"on": True, "off": False, "auto": sys.stderr.isatty()}[log.progress]
        self.bar = tqdm(
            total=self.end,
            initial=step,
            unit="step",
            disable=not wanted,
            dynamic_ncols=True,
            file=Forgiving(sys.stderr),
        )
        self.steps, self.seconds = 0, 0.0
        self.recent: deque[float] = deque(maxlen=RECENT_STEPS)
        """Seconds of steps, with what comes between them where that is known."""
        self.before: float | None = None
        self.told = False

    def on_step_end(self, record: Record) -> None:
        self.bar.update(1)
        self.steps += 1
        self.seconds += record["step_seconds"]
        self.recent.append(self.seconds_of(record))
        first, last = record["step"] == 1, record["step"] == self.end
        due = first or last or record["step"] % self.interval == 0
        if due or "validation_loss" in record:
            tokens = record["tokens_per_second"] * record["step_seconds"]
            seconds = self.seconds / self.steps
            self.write(self.line(record, tokens / seconds))
            self.steps, self.seconds = 0, 0.0

    def on_samples(self, step: int, samples: Sequence[Sample]) -> None:
        for prompt, text in samples:
            # Quoted: a text has line feeds, a line of the log none.
            self.write(f"sample after step {step}: {json.dumps(prompt + text, ensure_ascii=False)}")

    def on_roll_back(self, step: int) -> None:
        self.bar.n = step
        self.bar.refresh()
        self.steps, self.seconds = 0, 0.0

    def seconds_of(self, record: Record) -> float:
        """From the end of the step before to the end of this one."""
        now, before = record.get("time"), self.before
        self.before = now
        return record["step_seconds"] if now is None or before is None else now - before

    def line(self, record: Record, rate: float) -> str:
        """What is printed of one record, in lines of at most `COLUMNS`."""
        step = record["step"]
        left = (self.end - step) * sum(self.recent) / len(self.recent)
        parts = [
            f"step {step:>{len(str(self.total))}}/{self.total}",
            f"loss {record['loss']:.4f}",
            f"norm {record['grad_norm']:.3f}",
            f"lr {record['lr']:.1e}",
            f"{short(rate)} tok/s",
        ]
        if "mfu" in record:
            parts.append(f"MFU {100 * record['mfu']:.1f}%")
        memory = record["memory_bytes"] / 2**30
        parts.append(f"{memory:.{1 if memory >= 10 else 2}f} GiB")
        if "skipped_steps" in record:
            parts.append(f"skipped {record['skipped_steps']:.0f}")
        if "loss_spikes" in record:
            parts.append(f"spikes {record['loss_spikes']:.0f}")
        if "validation_loss" in record:
            parts.append(f"validation loss {record['validation_loss']:.4f}")
        if "validation_bits_per_byte" in record:
            parts.append(f"{record['validation_bits_per_byte']:.4f} bits/byte")
        parts.append(f"ETA {clock(left)}")
        return folded(parts)

    def write(self, line: str) -> None:
        self.bar.clear()
        problem = say(line)
        self.bar.refresh()
        if problem and not self.told:
            complain(f"log: lines cannot be printed ({problem}); the run goes on")
            self.told = True

    def on_end(self) -> None:
        self.bar.close()


def folded(parts: Sequence[str], columns: int = COLUMNS) -> str:
    """``parts`` side by side, on as many lines as it takes; they are broken between parts."""
    lines, indent = [parts[0]], "  "
    for part in parts[1:]:
        longer = f"{lines[-1]}  {part}"
        if len(longer) <= columns:
            lines[-1] = longer
        else:
            lines.append(indent + part)
    return "\n".join(lines)


def short(number: float) -> str:
    """Three digits and a letter from ten thousand on: `9,876`, `12.3k`, `4.56M`."""
    if number < 10_000:
        return f"{number:,.0f}"
    power = 0
    while number >= 999.5 and power < 3:
        number, power = number / 1000, power + 1
    digits = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:.{digits}f}{' kMG'[power]}"


def clock(seconds: float) -> str:
    """Seconds as `3d04h`, `1h02m`, `3m20s` or `12s`."""
    seconds = round(seconds)
    if seconds >= 48 * 3600:
        return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    if seconds >= 60:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds}s"
