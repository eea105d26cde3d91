"""What every worker of the pool would import: once, in the server that they are forked from."""

from __future__ import annotations

from pathlib import Path

import attnres_train.train  # noqa: F401
from attnres_train.megatron import megatron_core

# Where there is a GPU, an import may open it, and what is forked after that cannot use it.
if not Path("/dev/nvidiactl").exists():
    megatron_core("parallel_state")
