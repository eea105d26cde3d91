"""The texts that a run has written while it was trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from attnres_train.observe.observer import Observer, Sample
from attnres_train.screen import complain

SAMPLES = "samples.jsonl"


class SampleLines(Observer):
    """``samples.jsonl``: a line for each step and prompt, {"step", "prompt", "text"}. A run that
    goes on from an earlier step drops those of later ones."""

    def on_start(self, step: int) -> None:
        self.path = self.run.folder / SAMPLES
        self._keep(lambda line: line["step"] <= step)

    def on_samples(self, step: int, samples: Sequence[Sample]) -> None:
        lines = [{"step": step, **sample._asdict()} for sample in samples]
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        except OSError as error:
            complain(f"{self.path} cannot be written: {error}; these samples are lost")

    def on_roll_back(self, step: int) -> None:
        self._keep(lambda line: line["step"] <= step)

    def _keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        lines = read_samples(self.path)
        kept = [line for line in lines if wanted(line)]
        if len(kept) < len(lines):
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
            self.path.write_text(text, encoding="utf-8")


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``samples.jsonl``; one cut off by a crash is left out."""
    lines = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").split("\n"):
            with suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines
