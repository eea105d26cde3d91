from __future__ import annotations

import pytest

from tests.data.tiny import write_text
from tests.tiny import TinyRuns, write_config


@pytest.fixture(scope="session")
def short(tmp_path_factory, pool) -> TinyRuns:
    """Of documents shorter than a sample, whose ends have no loss."""
    folder = tmp_path_factory.mktemp("short")
    runs = TinyRuns(folder, pool)
    corpus = {"kind": "text", "path": str(write_text(folder / "lines", 150, lines=1))}
    data = runs.config().data.model_dump(mode="json", exclude_unset=True)
    runs.path = write_config(folder, data={**data, "corpus": [corpus], "mask_document_ends": True})
    return runs
