"""Whether somebody else (torchrun, SLURM) has started the processes of the run. Loads no torch."""

from __future__ import annotations

import os

from attnres_train.errors import UserError


def launched_world_size() -> int | None:
    """The number of processes that a launcher has started, of which this is one; None without a
    launcher: WORLD_SIZE alone, as some containers set it, is none.

    Raises UserError where a launcher has left out a variable, or it is no number.
    """
    if not all(os.environ.get(name) for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR")):
        return None
    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT"):
        value = os.environ.get(name)
        if not (value and value.isdecimal()):
            raise UserError(
                f"{name} is {'not set' if value is None else repr(value)}, but WORLD_SIZE, RANK "
                "and MASTER_ADDR are in the environment, as if a launcher had started this "
                f"process: set {name} to a number, or unset them to start local processes"
            )
    return int(os.environ["WORLD_SIZE"])
