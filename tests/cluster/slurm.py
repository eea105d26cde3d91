"""A SLURM of two nodes on this machine: munge, the controller and two node daemons, each a process
of ours in a folder of ours. Nothing of the system's own SLURM is touched."""

from __future__ import annotations

import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.tiny import free_port

PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue")
NODES = ("n1", "n2")
SECONDS = 600  # on a busy machine; a few are enough otherwise
# Debian has daemons where users do not look for programs.
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
FirstJobId={first_job}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=60
MessageTimeout=30
KillWait=60
MinJobAge=3600
JobRequeue=1
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[0]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why no SLURM can be started here; None where it can."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: slurm-wlm and munge)"
    return None


class Cluster:
    """Two nodes that take jobs. ``environment`` is what SLURM's commands need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str) -> None:
        """A daemon in the foreground, called ``name``, with its output in a file."""
        with open(self.folder / f"{name}.log", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                command,
                env=self.environment | {"HOME": str(self.folder)},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start_node(self, name: str) -> None:
        config = str(self.folder / "slurm.conf")
        self.start(name, "slurmd", "-D", "-N", name, "-f", config)

    def stop(self, name: str) -> None:
        """End a daemon, by its process id."""
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()

    def run(self, *command: str, **changes: str) -> str:
        """A command of SLURM's; what it prints. Fails with what it says."""
        done = subprocess.run(
            command,
            env=os.environ | self.environment | changes,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr, self.logs())
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job: JobState, Restarts, ExitCode, ..."""
        words = self.run("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"{what}\n{self.logs()}"
            time.sleep(0.2)

    def wait_for_state(self, number: str, *states: str) -> dict[str, str]:
        self.wait_for(lambda: self.job(number)["JobState"] in states, f"job not in {states}")
        return self.job(number)

    def logs(self) -> str:
        """The ends of all that was written here."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {f.name}\n{f.read_text(errors='replace')[-3000:]}" for f in files)

    def clear(self) -> None:
        """End all jobs for good, and wait until they are gone."""
        for number in self.run("squeue", "--noheader", "--format=%i").split():
            with suppress(AssertionError):  # it is over, or none of it runs
                self.run("scontrol", "update", f"JobId={number}", "Requeue=0")
                self.run("scancel", "--full", "--signal=KILL", number)
        self.run("scancel", "--user", getpass.getuser())
        self.wait_for(lambda: not self.run("squeue", "--noheader").strip(), "jobs are left")

    def end(self) -> None:
        with suppress(AssertionError, subprocess.TimeoutExpired):
            self.clear()
        for name in reversed(list(self.daemons)):
            self.stop(name)
        for path in Path("/proc").glob("[0-9]*/cwd"):  # of jobs that did not end
            with suppress(OSError):
                if path.readlink() == self.folder:
                    os.kill(int(path.parent.name), signal.SIGKILL)


@contextmanager
def slurm(folder: Path) -> Iterator[Cluster]:
    """Start a `Cluster` in ``folder``, both nodes idle; all of it is ended at last."""
    cluster = Cluster(folder)
    ports = free_port(), free_port()
    for name in ("state", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir()
    text = CONFIG.format(
        host=socket.gethostname(),
        user=getpass.getuser(),
        folder=folder,
        controller_port=free_port(),
        # Of another cluster beside this one the batch script would make the same port.
        first_job=random.SystemRandom().randrange(1, 10_000),
        ports=ports,
    )
    (folder / "slurm.conf").write_text(text)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    try:
        places = ("key-file", "socket", "pid-file", "log-file", "seed-file")
        options = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in places]
        # --force: the folder's parents are not as strict as munge would have them.
        cluster.start("munged", "munged", "--foreground", "--force", "--num-threads=2", *options)
        cluster.wait_for((folder / "munge.socket").exists, "munged does not start")
        cluster.start("slurmctld", "slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        for node in NODES:
            cluster.start_node(node)
        cluster.wait_for(cluster_is_idle(cluster), "nodes do not come up")
        yield cluster
    finally:
        cluster.end()


def cluster_is_idle(cluster: Cluster) -> Callable[[], bool]:
    def is_idle() -> bool:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%T"],
            env=os.environ | cluster.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.split() == ["idle"] * len(NODES)

    return is_idle
