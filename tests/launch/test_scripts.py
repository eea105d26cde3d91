"""launch/ and scripts/: torchrun on two agents of one machine, SLURM against stand-ins for its
commands."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny import column, environment, free_port, grid

SECONDS = 300  # on a busy machine; a few are enough otherwise
ROOT = Path(__file__).parents[2]
TORCHRUN = ROOT / "launch" / "torchrun.sh"
SBATCH = ROOT / "launch" / "slurm.sbatch"
BIN = Path(sys.executable).parent


def test_shellcheck_has_nothing_to_say():
    scripts = [*ROOT.glob("scripts/*.sh"), *ROOT.glob("launch/*"), ROOT / ".ci" / "run"]
    assert len(scripts) >= 6
    checked = subprocess.run(
        [BIN / "shellcheck", *scripts], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout
    for script in scripts:
        assert os.access(script, os.X_OK), script


def torchrun(*arguments: str) -> list[str]:
    return ["bash", str(TORCHRUN), *arguments]


def test_torchrun_dry_run_prints_the_command():
    arguments = ["--nnodes", "2", "--", "configs/quickstart.yaml", "run.name=a b"]
    printed = subprocess.check_output(torchrun("--dry-run", *arguments), text=True)
    words = shlex.split(printed)
    module = words.index("-m", words.index("torch.distributed.run"))
    assert words[1:3] == ["-m", "torch.distributed.run"]
    assert words[3:module] == ["--nnodes", "2"]
    assert words[module:] == [
        "-m", "attnres_train", "train", "configs/quickstart.yaml", "run.name=a b"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--nproc-per-node 2", "--nproc-per-node 2 --local-addr localhost"),
        ("--standalone --nnodes=1:1", "--standalone --nnodes=1:1 --local-addr localhost"),
        ("--nnodes 1 --max-restarts 2", "--nnodes 1 --max-restarts 2 --local-addr localhost"),
        ("--nnodes 2 --master-addr 10.0.0.1", "--nnodes 2 --master-addr 10.0.0.1"),
        ("--nnodes 2 --local_addr=10.0.0.1", "--nnodes 2 --local_addr=10.0.0.1"),
        ("--nnodes 2", None),
        ("--nnodes=12 --rdzv-endpoint a:1", None),
    ],
)
def test_torchrun_where_the_host_name_leads_nowhere(options, told):
    probe = ["unshare", "-u", "sh", "-c", 'hostname nohost123.invalid && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*probe, "true"], check=False).returncode:
        pytest.skip("no permission for a host name of one's own")
    words = [*probe, *torchrun("--dry-run", *options.split(), "--", "c.yaml")]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    if told is None:
        assert done.returncode == 2
        assert done.stderr.startswith(
            "error: nohost123.invalid, the name of this machine, does not"
        )
    else:
        assert f"torch.distributed.run {told} -m attnres_train" in done.stdout


@pytest.mark.parametrize("arguments", [[], ["--nnodes", "2"], ["--nnodes", "2", "--"]])
def test_torchrun_without_a_config_tells_its_usage(arguments):
    result = subprocess.run(torchrun(*arguments), capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"usage: {TORCHRUN}")


@pytest.mark.nightly
def test_two_torchrun_agents_train_together(tiny):
    """The way of two machines, one process each."""
    port, overrides = free_port(), [*grid(2, 1), "run.name=agents", "train.train_iters=2"]
    path = {"PATH": f"{BIN}:{os.environ['PATH']}"}
    agents = []
    for node in ("0", "1"):
        options = ["--nnodes", "2", "--node-rank", node, "--nproc-per-node", "1"]
        options += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        agents.append(
            subprocess.Popen(
                torchrun(*options, "--", str(tiny.path), *overrides),
                env=environment(**path),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    first, second = (agent.communicate(timeout=SECONDS) for agent in agents)
    assert [agent.returncode for agent in agents] == [0, 0], first[1] + second[1]
    assert "step 2/2" in first[0]
    assert "step" not in second[0]
    whole = tiny.train("whole-1x1", *grid(1, 1))
    run = tiny.folder / "runs" / "agents"
    assert column(run, "loss") == pytest.approx(column(whole, "loss")[:2], rel=1e-5)


# Stand-ins, in the folder $CLUSTER: srun starts two tasks (a second one looks whether all nodes are
# there), scancel signals them, scontrol knows two hosts and notes a requeue, squeue tells $STATE.
# A controller that is `busy` does not answer scontrol, once, and scancel too late.
# `python` notes what a task is given and ends as $TASK says.
COMMANDS = {
    "srun": """
[[ $* == *" true" ]] && exit "$NODES_ANSWER"
while [[ $1 == --* ]]; do echo "$1" >> "$CLUSTER/srun.options"; shift; done
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 "$@" &
    echo $! >> "$CLUSTER/pids"
done
code=0
for pid in $(cat "$CLUSTER/pids"); do wait "$pid" || code=$?; done
exit $code
""",
    "scancel": """
echo "$*" > "$CLUSTER/scancelled"
xargs kill -USR1 < "$CLUSTER/pids"
[[ ! -e $CLUSTER/busy ]]
""",
    "scontrol": """
[[ $2 == hostnames ]] || ! rm "$CLUSTER/busy" 2>/dev/null || exit 1
case $1 in
    show) [[ $2 == hostnames && $3 == "node[1-2]" ]] && printf 'node1\\nnode2\\n'
        [[ $2 != node ]] || echo "   NodeAddr=$3.cluster NodeHostName=$3" ;;
    requeue) echo "$2" > "$CLUSTER/requeued" ;;
esac
""",
    "squeue": 'echo "$STATE"',
}
PYTHON = """
import os, signal, sys, time

def stop(number, frame):
    write("saved", "")
    sys.exit(0)

def write(what, text):
    task = os.path.join(os.environ["CLUSTER"], "task" + os.environ["RANK"])
    open(f"{task}.{what}.part", "w").write(text)
    os.replace(f"{task}.{what}.part", f"{task}.{what}")

given = "{RANK}/{WORLD_SIZE} {LOCAL_RANK} {MASTER_ADDR}:{MASTER_PORT} {OMP_NUM_THREADS} "
write("given", given.format(**os.environ) + " ".join(sys.argv[1:]))
task = os.environ["TASK"]
while task == "early" and signal.SIGUSR1 not in signal.sigpending():
    time.sleep(0.05)
signal.signal(signal.SIGUSR1, stop)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
write("ready", "")
while task == "wait":
    time.sleep(0.05)
sys.exit(int(task))
"""


@pytest.fixture
def cluster(tmp_path):
    """Starts a batch job with the arguments given: `cluster(task, *arguments)`."""
    for name, text in COMMANDS.items():
        script = tmp_path / name
        script.write_text(f"#!/usr/bin/env bash\n{text}")
        script.chmod(0o755)
    (tmp_path / "python").write_text(f"#!{sys.executable}\n{PYTHON}")
    (tmp_path / "python").chmod(0o755)

    def start(task: str, *arguments: str, **changes: str) -> subprocess.Popen[str]:
        job = {"SLURM_JOB_ID": "20003", "SLURM_JOB_NODELIST": "node[1-2]"}
        job |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "3", "OMP_NUM_THREADS": ""}
        job |= {"NODES_ANSWER": "0", "STATE": "RUNNING", **changes}
        places = {"CLUSTER": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return subprocess.Popen(
            ["bash", str(SBATCH), *arguments],
            env=environment(**job, **places, TASK=task),
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.mark.parametrize("code", [0, 3])
def test_slurm_gives_every_task_its_rank_and_takes_its_exit_code(cluster, tmp_path, code):
    job = cluster(str(code), "c.yaml", "run.name=a b")
    assert job.wait(SECONDS) == code, job.stderr.read()
    arguments = "-u -m attnres_train train c.yaml run.name=a b"
    assert (tmp_path / "task0.given").read_text() == f"0/2 0 node1.cluster:28003 3 {arguments}"
    assert (tmp_path / "task1.given").read_text() == f"1/2 1 node1.cluster:28003 3 {arguments}"
    assert (tmp_path / "srun.options").read_text().split() == [
        "--kill-on-bad-exit=1",
        "--cpus-per-task=3",
    ]
    assert not (tmp_path / "requeued").exists()


@pytest.mark.parametrize(("code", "requeued"), [("0", False), ("1", True), ("2", False)])
def test_slurm_requeues_where_a_node_does_not_answer(cluster, tmp_path, code, requeued):
    job = cluster(code, "c.yaml", NODES_ANSWER="1")
    assert job.wait(SECONDS) == int(code)
    assert (tmp_path / "requeued").exists() == requeued
    assert ("a node of this job does not answer" in job.stderr.read()) == requeued


def test_slurm_does_not_requeue_what_is_cancelled(cluster, tmp_path):
    """The tasks are told by scancel itself, and once."""
    job = cluster("wait", "c.yaml", STATE="CANCELLED")
    wait_for_tasks(job, tmp_path)
    job.send_signal(signal.SIGTERM)
    for pid in (tmp_path / "pids").read_text().split():
        os.kill(int(pid), signal.SIGUSR1)
    assert job.wait(SECONDS) == 0, job.stderr.read()
    assert not (tmp_path / "scancelled").exists()
    assert not (tmp_path / "requeued").exists()


def wait_for_tasks(job: subprocess.Popen[str], folder: Path, what: str = "ready") -> None:
    deadline = time.monotonic() + SECONDS
    while not all((folder / f"task{rank}.{what}").exists() for rank in (0, 1)):
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_saves_and_requeues_before_the_time_limit(cluster, tmp_path, number):
    job = cluster("wait", "c.yaml")
    wait_for_tasks(job, tmp_path)
    job.send_signal(number)
    assert job.wait(SECONDS) == 0, job.stderr.read()
    assert (tmp_path / "scancelled").read_text() == "--signal=USR1 20003\n"
    assert (tmp_path / "task0.saved").exists() and (tmp_path / "task1.saved").exists()
    assert (tmp_path / "requeued").read_text() == "20003\n"


def test_slurm_asks_a_busy_controller_again(cluster, tmp_path):
    (tmp_path / "busy").touch()
    job = cluster("wait", "c.yaml")
    wait_for_tasks(job, tmp_path)
    assert "node1.cluster:28003" in (tmp_path / "task0.given").read_text()
    (tmp_path / "busy").touch()
    job.send_signal(signal.SIGUSR1)
    assert job.wait(SECONDS) == 0, job.stderr.read()
    assert (tmp_path / "task0.saved").exists() and (tmp_path / "task1.saved").exists()
    assert (tmp_path / "requeued").read_text() == "20003\n"
    assert not (tmp_path / "busy").exists()


def test_slurm_holds_back_a_signal_that_python_cannot_take_yet(cluster, tmp_path):
    job = cluster("early", "c.yaml")
    wait_for_tasks(job, tmp_path, "given")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(SECONDS) == 0, job.stderr.read()
    assert (tmp_path / "task0.saved").exists() and (tmp_path / "task1.saved").exists()
    assert not (tmp_path / "task0.ready").exists()


def test_slurm_without_a_config_tells_its_usage(cluster):
    job = cluster("0")
    assert job.wait(SECONDS) == 2
    assert job.stderr.read().startswith("usage: sbatch launch/slurm.sbatch CONFIG")
