from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def benchmarks(monkeypatch) -> None:
    """Makes the scripts' folder importable."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
