"""The run as a person reads it: one line per interval, and a progress bar on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from tqdm import tqdm

from attnres_train.observe.observer import Observer, Record, Sample
from attnres_train.screen import Forgiving, complain, say


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
        self.told = False

    def on_step_end(self, record: Record) -> None:
        self.bar.update(1)
        self.steps += 1
        self.seconds += record["step_seconds"]
        first, last = record["step"] == 1, record["step"] == self.end
        due = first or last or record["step"] % self.interval == 0
        if due or "validation_loss" in record:
            tokens = record["tokens_per_second"] * record["step_seconds"]
            seconds = self.seconds / self.steps
            self.write(self.line(record, tokens / seconds, seconds))
            self.steps, self.seconds = 0, 0.0

    def on_samples(self, step: int, samples: Sequence[Sample]) -> None:
        for prompt, text in samples:
            # Quoted: a text has line feeds, a line of the log none.
            self.write(f"sample after step {step}: {json.dumps(prompt + text, ensure_ascii=False)}")

    def on_roll_back(self, step: int) -> None:
        self.bar.n = step
        self.bar.refresh()
        self.steps, self.seconds = 0, 0.0

    def line(self, record: Record, rate: float, step_seconds: float) -> str:
        """The log line of one record."""
        step = record["step"]
        parts = [
            f"step {step:>{len(str(self.total))}}/{self.total} ({100 * step / self.total:.0f}%)",
            f"loss {record['loss']:.4f}",
            f"grad norm {record['grad_norm']:.3f}",
            f"lr {record['lr']:.2e}",
            f"{rate:,.0f} tokens/s",
        ]
        if "mfu" in record:
            parts.append(f"MFU {100 * record['mfu']:.1f}%")
        parts.append(f"memory {record['memory_bytes'] / 2**30:.2f} GiB")
        if "skipped_steps" in record:
            parts.append(f"skipped {record['skipped_steps']:.0f}")
        if "loss_spikes" in record:
            parts.append(f"spikes {record['loss_spikes']:.0f}")
        if "validation_loss" in record:
            parts.append(f"validation loss {record['validation_loss']:.4f}")
        if "validation_bits_per_byte" in record:
            parts.append(f"{record['validation_bits_per_byte']:.4f} bits/byte")
        parts.append(f"ETA {clock((self.end - step) * step_seconds)}")
        return " | ".join(parts)

    def write(self, line: str) -> None:
        self.bar.clear()
        problem = say(line)
        self.bar.refresh()
        if problem and not self.told:
            complain(f"log: lines cannot be printed ({problem}); the run goes on")
            self.told = True

    def on_end(self) -> None:
        self.bar.close()


def clock(seconds: float) -> str:
    """Seconds as `1h02m`, `3m20s` or `12s`."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    if seconds >= 60:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds}s"
