"""The meeting point of processes that are all on this machine: nobody else can reach it.

torch's own rendezvous listen on every interface, and whoever reaches the store of a run can change
what its ranks tell each other.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

LOOPBACK = "127.0.0.1"
BACKEND = "attnres-train-local"


class LocalRendezvous(RendezvousHandler):
    """Of one agent, whose workers use its store."""

    def __init__(self, run_id: str, told: Mapping[str, str]) -> None:
        self.run_id = run_id
        # A socket of ours: the store would bind one to all interfaces.
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.bind((LOOPBACK, 0))
            listener.listen(4096)
            self.port = listener.getsockname()[1]
            self._store = TCPStore(
                LOOPBACK,
                self.port,
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
        for key, value in told.items():
            self._store.set(key, value)

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        store = PrefixStore(self.run_id, self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(LOOPBACK, self.port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self.run_id

    def shutdown(self) -> bool:
        return True


def register(told: Mapping[str, str]) -> str:
    """Make `LocalRendezvous` known to torch; returns its name there. ``told`` is in the store
    before any worker is."""

    def create(parameters: RendezvousParameters) -> RendezvousHandler:
        return LocalRendezvous(parameters.run_id, told)

    rendezvous_handler_registry.register(BACKEND, create)
    return BACKEND
