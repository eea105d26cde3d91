"""What a stranger's file, a colleague on the same machine or a saved run must not be able to do or
tell."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from attnres_train.checkpoint.old_metadata import SafeReader
from attnres_train.config.loader import load_config
from attnres_train.config.secrets import without_secrets
from tests.tiny import environment, grid

PACKAGE = Path(__file__).parents[1] / "attnres_train"


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def old_checkpoint(tmp_path) -> Path:
    folder = tmp_path / "checkpoint"
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


def load(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16)}
    dcp.load(tensors, storage_reader=SafeReader(folder), no_dist=True)
    return tensors


def test_a_checkpoint_of_tensors_is_read(old_checkpoint):
    assert load(old_checkpoint)["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_checkpoint_that_would_run_something_does_not(old_checkpoint, tmp_path):
    attacked = tmp_path / "attacked"
    (old_checkpoint / ".metadata").write_bytes(pickle.dumps(Attack(attacked)))
    with pytest.raises(BaseException, match="mkdir does not belong into a checkpoint"):
        load(old_checkpoint)
    assert not attacked.exists()


def test_an_entry_that_is_no_tensor_is_not_unpickled(old_checkpoint):
    metadata = pickle.loads((old_checkpoint / ".metadata").read_bytes())
    metadata.state_dict_metadata["a"] = BytesStorageMetadata()
    (old_checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(BaseException, match="BytesStorageMetadata does not belong"):
        load(old_checkpoint)


def test_nothing_else_in_the_package_reads_pickles_or_starts_shells():
    wrong = {
        "pickle.load": r"pickle\.loads?\(|dcp\.FileSystemReader\(",
        "torch.load": r"torch\.load\((?!.*weights_only=True)",
        "numpy's pickles": r"allow_pickle\s*=\s*True",
        "yaml's objects": r"yaml\.(load|unsafe_load|full_load)\(|yaml\.(Unsafe|Full)?Loader\b",
        "a shell": r"shell\s*=\s*True|os\.(system|popen)\(",
        "private files": r"mkstemp|NamedTemporaryFile|mkdtemp",
    }
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        found = [what for what, pattern in wrong.items() if re.search(pattern, text)]
        assert not found, (path, found)


def test_values_of_the_command_line_are_no_shell_text(tmp_path):
    """As SLURM's script hands them on, and torchrun's."""
    (tmp_path / "srun").write_text(
        '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
    )
    (tmp_path / "python").write_text('#!/bin/bash\nprintf "%s\\n" "$@" > "$HERE/words"\n')
    (tmp_path / "scontrol").write_text("#!/bin/bash\necho node1\n")
    for name in ("srun", "python", "scontrol"):
        (tmp_path / name).chmod(0o755)
    evil = ["run.name=$(touch attacked)", "run.dir=a b;touch attacked", "x=`touch attacked`'\""]
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n", "SLURM_PROCID": "0"}
    job |= {"SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "HERE": str(tmp_path)}
    script = PACKAGE.parent / "launch" / "slurm.sbatch"
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(
        ["bash", script, "c.yaml", *evil], cwd=tmp_path, env=environment(**job, **path), check=True
    )
    assert (tmp_path / "words").read_text().splitlines()[-4:] == ["c.yaml", *evil]
    assert not list(tmp_path.glob("attacked"))


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("https://user:pw@host/data?x=1", "https://***@host/data?x=1"),
        ("s3://bucket/a?X-Amz-Signature=abc&y=2", "s3://bucket/a?X-Amz-Signature=***&y=2"),
        ("log.observers.0.options.api_key=abc", "log.observers.0.options.api_key=***"),
        ("--hf_token=abc", "--hf_token=***"),
        ({"options": {"password": "x"}}, {"options": {"password": "***"}}),
        ({"unk_token": "<unk>"}, {"unk_token": "<unk>"}),
        (["train", "train.lr=1"], ["train", "train.lr=1"]),
        ("data.tokenizer.special_tokens=[a]", "data.tokenizer.special_tokens=[a]"),
    ],
)  # fmt: skip
def test_secrets_are_not_shown(value, shown):
    assert without_secrets(value) == shown


def test_a_run_folder_holds_no_secrets_and_resumes(tiny):
    url = "https://user:hunter2@host/a"
    words = [f"log.wandb.project={url}", "train.train_iters=2"]
    run = tiny.train("secretive", *words, "train.stop_after=1")
    run = tiny.train("secretive", *words)
    texts = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert not [file for file, text in texts.items() if b"hunter2" in text]
    assert load_config(run / "config.yaml").log.wandb.project == "https://***@host/a"


def test_files_follow_the_umask(tiny):
    run = tiny.train("whole-1x1", *grid(1, 1))
    umask = os.umask(0)
    os.umask(umask)
    for path in [run, *run.rglob("*"), *(tiny.folder / "cache").rglob("*")]:
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert path.stat().st_mode & 0o777 == wanted, path


LISTENING = """
import torch.distributed as dist
from attnres_train.supervise.local_rendezvous import LocalRendezvous
info = LocalRendezvous("run", {}).next_rendezvous()
address = info.bootstrap_store_info
store = dist.TCPStore(address.master_addr, address.master_port, is_master=False)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
"""


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="finds sockets in /proc")
def test_one_machine_listens_to_itself_alone():
    show = LISTENING + (
        "import os, pathlib\n"
        "own = {os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')"
        " if os.path.exists(f'/proc/self/fd/{n}')}\n"
        "rows = [line.split() for f in ('tcp', 'tcp6') if os.path.exists(f'/proc/net/{f}')"
        " for line in pathlib.Path(f'/proc/net/{f}').read_text().splitlines()[1:]]\n"
        "print(*[r[1].split(':')[0] for r in rows if r[3] == '0A' and f'socket:[{r[9]}]' in own])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", show], env=environment(), capture_output=True, text=True, check=False
    )
    addresses = done.stdout.split()
    assert addresses and set(addresses) == {"0100007F"}, (addresses, done.stderr)
