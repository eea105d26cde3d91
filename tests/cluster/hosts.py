"""Two machines as network namespaces: each with a network, a host name (that resolves nowhere) and,
if asked for, a disk of its own, joined by one link."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.tiny import command, environment, free_port

SECONDS = 300  # on a busy machine; a few are enough otherwise
NAMES = ("host-a", "host-b")
ADDRESSES = ("10.177.0.1", "10.177.0.2")
DEVICES = ("to-b", "to-a")


def why_not() -> str | None:
    """Why there are no namespaces here; None where there are."""
    if not (shutil.which("ip") and shutil.which("unshare")):
        return "ip (iproute2) or unshare is not installed"
    name = f"attnres-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    if made.returncode:
        return f"no permission for network namespaces: {made.stderr.decode().strip()}"
    subprocess.run(["ip", "netns", "del", name], check=False)
    return None


class Hosts:
    """The two machines. What runs there is started by `train`, one rank on each."""

    def __init__(self) -> None:
        self.spaces = [f"attnres-{os.getpid()}-{name}" for name in NAMES]
        self.processes: list[subprocess.Popen[str]] = []

    def join(self) -> None:
        for space in self.spaces:
            _run("ip", "netns", "add", space)
        (here, there), (near, far) = self.spaces, DEVICES
        _run(*f"ip link add {near} netns {here} type veth peer name {far} netns {there}".split())
        for space, device, address in zip(self.spaces, DEVICES, ADDRESSES, strict=True):
            _run(*f"ip -n {space} addr add {address}/24 dev {device}".split())
            for name in (device, "lo"):
                _run(*f"ip -n {space} link set {name} up".split())

    def cut(self) -> None:
        _run(*f"ip -n {self.spaces[0]} link set {DEVICES[0]} down".split())

    def restore(self) -> None:
        _run(*f"ip -n {self.spaces[0]} link set {DEVICES[0]} up".split())

    def freeze(self, host: int) -> None:
        """Nothing runs on that machine any more; its network goes on to acknowledge."""
        os.killpg(self.processes[host].pid, signal.SIGSTOP)

    def train(self, *arguments: str | Path, disks: tuple[Path, Path] | None = None) -> None:
        """Start `attnres-train train` with ``arguments``, a rank on each machine. ``disks`` are
        folders, the second of which its machine sees where the first one is."""
        port = str(free_port())
        for rank, space in enumerate(self.spaces):
            script = f"hostname {NAMES[rank]}\n"
            if disks:
                script += shlex.join(["mount", "--bind", str(disks[rank]), str(disks[0])]) + "\n"
            script += "exec " + shlex.join(command("train", *arguments))
            place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
            self.processes.append(
                subprocess.Popen(
                    [
                        "ip",
                        "netns",
                        "exec",
                        space,
                        "unshare",
                        "--uts",
                        "--mount",
                        "sh",
                        "-c",
                        script,
                    ],
                    env=environment() | place | {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": port},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            )

    def end(self, *hosts: int) -> list[tuple[int, str]]:
        """Wait for the processes on ``hosts``: exit code, and all that they printed."""
        found = []
        for host in hosts:
            out, err = self.processes[host].communicate(timeout=SECONDS)
            found.append((self.processes[host].returncode, out + err))
        return found

    def close(self) -> None:
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        for space in self.spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """`Hosts`, gone at the end with all that runs there."""
    hosts = Hosts()
    try:
        hosts.join()
        yield hosts
    finally:
        hosts.close()


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
