"""Ranks of a pool as if each ran on a machine of its own: another name, another working folder, and
nothing there but what it is given."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist

from tests.tiny import torchrun_environment


@contextmanager
def own_machine(folder: Path, port: int) -> Iterator[str]:
    """Become machine ``node<rank>``, working in ``folder``/node<rank>; yields the name."""
    name, before = f"node{dist.get_rank()}", os.getcwd()
    (folder / name).mkdir(parents=True, exist_ok=True)
    with torchrun_environment(port), patch.object(socket, "gethostname", lambda: name):
        os.environ["LOCAL_RANK"] = "0"
        os.chdir(folder / name)
        try:
            yield name
        finally:
            os.chdir(before)
