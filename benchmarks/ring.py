"""A ring of network namespaces: every rank a host of its own, with a link to each neighbour.

Each link is a veth pair, full duplex, with the same rate in both directions (`tc tbf`). Linux, root
and iproute2 (`ip`, `tc`) are needed.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

CLONE_NEWNET = 0x40000000
MTU, HEADERS = 9000, 66  # Ethernet, IPv4 and TCP with time stamps
BURST_BYTES, QUEUE_BYTES = 68 * 1024, 16 * 1024 * 1024
SYSCTLS = {
    "ip_forward": "1",
    "tcp_congestion_control": "reno",
    # Small send buffers: what they do not hold, gloo's thread copies beside the passes.
    "tcp_wmem": "4096 131072 524288",
}


def what_is_missing() -> str | None:
    """What this machine lacks to make namespaces; None: nothing."""
    if os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "root (it makes network namespaces and shapes their links)"
    tools = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
    return f"{' and '.join(tools)} (Debian, Ubuntu: apt-get install iproute2)" if tools else None


def run(*command: str) -> None:
    """Raises RuntimeError with what the command said if it fails."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")


class Ring:
    """``num_ranks`` namespaces, gone at the end of the ``with`` block."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.names = [f"attnres-{os.getpid()}-{rank}" for rank in range(num_ranks)]
        self.devices: list[tuple[int, str]] = []

    def __enter__(self) -> Ring:
        try:
            for name in self.names:
                run("ip", "netns", "add", name)
            for rank, following in self._links():
                self._link(rank, following)
            for rank in range(self.num_ranks):
                self._route(rank)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def _links(self) -> Iterator[tuple[int, int]]:
        for rank in range(self.num_ranks if self.num_ranks > 2 else self.num_ranks - 1):
            yield rank, (rank + 1) % self.num_ranks

    def _link(self, rank: int, following: int) -> None:
        ends = [(rank, f"to{following}"), (following, f"to{rank}")]
        (here, near), (there, far) = ((self.names[end], device) for end, device in ends)
        run(*f"ip link add {near} netns {here} type veth peer name {far} netns {there}".split())
        for end, device in ends:
            ip = ["ip", "-n", self.names[end]]
            run(*ip, *f"addr add {address(end)}/32 dev {device}".split())
            run(*ip, *f"link set {device} mtu {MTU} up".split())
        self.devices += ends

    def _route(self, rank: int) -> None:
        """Neighbours directly, all others (for the set-up only) the shorter way round."""
        name, size = self.names[rank], self.num_ranks
        for other in set(range(size)) - {rank}:
            step = 1 if (other - rank) % size <= size // 2 else -1
            via = (rank + step) % size
            route = f"route add {address(other)} dev to{via} src {address(rank)}"
            onward = f"via {address(via)} onlink" if other != via else ""
            run("ip", "-n", name, *route.split(), *onward.split())
        for key, value in SYSCTLS.items():
            setting = f"echo {value} > /proc/sys/net/ipv4/{key}"
            run("ip", "netns", "exec", name, "sh", "-c", setting)
        run("ip", "-n", name, "link", "set", "lo", "up")

    def shape(self, bytes_per_second: float | None) -> None:
        """Let every direction of every link carry that much payload; None: no limit."""
        for rank, device in self.devices:
            tc = ["tc", "-n", self.names[rank], "qdisc"]
            if bytes_per_second is None:
                subprocess.run([*tc, "del", "dev", device, "root"], capture_output=True)
                continue
            rate = int(8 * bytes_per_second * MTU / (MTU - HEADERS))
            limits = f"rate {rate}bit burst {BURST_BYTES} limit {QUEUE_BYTES}"
            run(*tc, *f"replace dev {device} root tbf {limits}".split())

    def enter(self, rank: int) -> str:
        """Move the calling thread to the rank's namespace; returns a device with its address."""
        libc = ctypes.CDLL(None, use_errno=True)
        with Path("/run/netns", self.names[rank]).open() as namespace:
            if libc.setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns to {self.names[rank]}")
        return next(device for end, device in self.devices if end == rank)


def address(rank: int) -> str:
    return f"10.77.0.{rank + 1}"
