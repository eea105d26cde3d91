"""An observer that holds a run back for as long as a file is there."""

from __future__ import annotations

import time
from pathlib import Path

from attnres_train.extend import Observer, Section


class Pace(Observer):
    """Steps take a moment, later ones longer, while `file` exists. The last is written down."""

    class Options(Section):
        file: str
        """A file whose presence makes steps slow."""
        late: float = 5.0
        """Seconds that a step takes from the fourth on."""

    def on_step_begin(self, step: int) -> None:
        file = Path(self.options.file)
        file.with_suffix(".step").write_text(str(step))
        if file.exists():
            time.sleep(0.3 if step < 4 else self.options.late)
