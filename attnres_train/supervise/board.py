"""Where the ranks of a run tell each other that one has failed: a key in the store of the
rendezvous, which all of them reach, and the records in the run folder, where that is shared."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from attnres_train.supervise import failures

FAILED = "attnres_train/failed"


class Store(Protocol):
    """Of torch.distributed's stores, what is used here."""

    def set(self, key: str, value: str) -> None: ...

    def check(self, keys: list[str]) -> bool: ...

    def get(self, key: str) -> bytes: ...


class Board:
    """``store`` (None: there is none) is used by one thread at a time: a rank's board has a
    connection of its own, see `own_connection`. The process that serves it may be gone."""

    def __init__(self, folder: Path, rank: int, store: Store | None = None) -> None:
        self.folder, self.rank, self.store = folder, rank, store

    def post(self) -> None:
        """Tell the others that this rank has failed."""
        if self.store is not None:
            try:
                self.store.set(FAILED, str(self.rank))
            except Exception:  # whatever the store's client raises when its server is gone
                self.store = None

    def failed(self) -> int | None:
        """Another rank that has failed, None where none is known."""
        ranks = [int(path.stem.removeprefix("rank_")) for path in self._records()]
        if self.store is not None:
            try:
                if self.store.check([FAILED]):
                    ranks.append(int(self.store.get(FAILED)))
            except Exception:
                self.store = None
        return next((rank for rank in ranks if rank != self.rank), None)

    def _records(self) -> list[Path]:
        try:
            return failures.paths(self.folder)
        except OSError:
            return []


def own_connection() -> Store | None:
    """To the store with which this process's group was made; None in a run of one process."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    if not dist.is_initialized() or dist.get_world_size() == 1 or os.name == "nt":
        return None
    # A store of its own, lest it waits for a call of the main thread.
    store: Store = _get_default_store().clone()  # type: ignore[attr-defined]  # stubs lack it
    return store
