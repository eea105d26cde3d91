"""The tiny run in fp64, where layouts must agree to far more places than in fp32."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path
from unittest import mock

import torch

from attnres_train.training import building
from tests.tiny import TinyRuns, free_port, train_rank


def train_in_fp64(arguments: list[str], port: int) -> str:
    """As `tiny.train_rank`; returns what it warns of too."""
    fp64 = {"fp32": torch.float64}
    with (
        mock.patch.dict(building.PARAMETER_DTYPE, fp64),
        mock.patch.dict(building.STREAM_DTYPE, fp64),
        redirect_stderr(io.StringIO()) as warned,
    ):
        told = train_rank([*arguments, "optimizer.ns_dtype=fp64"], port)
    return told + warned.getvalue()


def run_in_fp64(tiny: TinyRuns, name: str, *words: str, ranks: int = 1) -> Path:
    """Run or resume run ``name``. Returns its folder, with what rank 0 told in ``screen``."""
    arguments = [str(tiny.path), f"run.name={name}", *words]
    screens = tiny.pool.run(train_in_fp64, ranks, arguments, free_port())
    folder = tiny.folder / "runs" / name
    (folder / "screen").write_text(screens[0])
    return folder
