"""Importing and exporting take the memory of a file of weights, not of the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.released import write_run

FILE_BYTES = 4 * 10**6
SCRIPT = """
import resource, sys
from pathlib import Path
import torch
from attnres_train.checkpoint.huggingface import write_weights
from attnres_train.checkpoint.huggingface_config import released_config, write_config
from attnres_train.config import load_config
from attnres_train.commands.export import export_weights, released_layout
from attnres_train.commands.import_ import import_weights
from attnres_train.model.residual.kind import residual_kind

def there_and_back(folder, *overrides):
    config = load_config(sys.argv[1], overrides)
    layout = released_layout(config.model)
    folder.mkdir()
    load = lambda names: {n: torch.randn(layout[n].shape).to(layout[n].dtype) for n in names}
    write_weights(folder, layout, load, file_bytes=FILE_BYTES)
    write_config(folder, released_config(config.model, 32, residual_kind(config.model).released()))
    yield
    import_weights(str(folder), sys.argv[1], list(overrides), FILE_BYTES)
    yield sum(tensor.numel() for tensor in layout.values())
    run = Path(config.run.dir) / config.run.name
    export_weights(str(run), str(folder.with_name(folder.name + "_again")), FILE_BYTES)
    yield

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

here = Path(sys.argv[1]).parent
list(there_and_back(here / "small", "run.name=small"))  # loads what is loaded once
big = ["run.name=big", "model.hidden_size=256", "model.moe.intermediate_size=256"]
steps = there_and_back(here / "big", *big, "model.moe.num_experts=32")
next(steps)
before = peak()
elements = next(steps)
imported = peak()
next(steps)
print("figures", elements, imported - before, peak() - imported)
"""


@pytest.mark.nightly
def test_peak_is_about_one_file(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    script = SCRIPT.replace("FILE_BYTES", str(FILE_BYTES))
    result = subprocess.run(
        [sys.executable, "-c", script, str(run)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    figures = result.stdout.splitlines()[-1].split()
    assert figures[0] == "figures"
    elements, imported, exported = map(int, figures[1:])
    state = 8 * elements  # fp32 weights and momentum; bf16 in the released files
    assert state > 200e6
    assert imported < 10 * FILE_BYTES, figures
    assert exported < 10 * FILE_BYTES, figures
