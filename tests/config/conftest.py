"""A small valid configuration, as text to change and as a `RunConfig`."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnres_train.config import ConfigError, RunConfig, check_config, load_config

SMALL = """\
model:
  hidden_size: 64
  num_layers: 4
  vocab_size: 4096
train:
  train_iters: 100
  seq_length: 32
  global_batch_size: 8
"""


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def small(small_file: Path) -> RunConfig:
    return load_config(small_file)


@pytest.fixture
def problems(small_file):
    """What `check_config` finds wrong with the small configuration under some overrides."""

    def check(*overrides: str, world_size: int | None = None) -> list[str]:
        try:
            check_config(load_config(small_file, overrides), world_size)
        except ConfigError as error:
            return error.problems
        return []

    return check
