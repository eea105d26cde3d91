"""What can be known before a run costs anything is told before data are prepared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attnres_train.__main__ import main
from attnres_train.config import ConfigError
from attnres_train.config.schema import RunConfig
from attnres_train.parallel.launched import launched_world_size
from attnres_train.supervise.preflight import cannot_write, check_machine
from tests.tiny import TinyRuns, environment, write_config


def config(folder: Path, device: str = "cpu") -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"dir": str(folder), "name": "mine"},
            "model": {"hidden_size": 8, "num_layers": 4, "vocab_size": 300},
            "train": {"train_iters": 1, "seq_length": 8, "global_batch_size": 4, "device": device},
        }
    )


def told(config: RunConfig, local_processes: int | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        check_machine(config, local_processes)
    return str(caught.value)


def test_folders_that_can_be_written_are_left_as_they_are(tmp_path):
    check_machine(config(tmp_path / "not" / "yet"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine" / "checkpoints").mkdir(parents=True)
    check_machine(config(tmp_path))
    assert not list((tmp_path / "mine" / "checkpoints").iterdir())


@pytest.mark.parametrize("place", ["mine", "mine/checkpoints"])
def test_a_file_where_a_folder_has_to_be(tmp_path, place):
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).touch()
    message = told(config(tmp_path))
    assert message.startswith("run.dir: ") and f"{tmp_path / place} is a file" in message


def test_a_link_to_nothing_where_a_folder_has_to_be(tmp_path):
    (tmp_path / "mine").symlink_to(tmp_path / "unmounted")
    assert f"{tmp_path / 'mine'} is a link to nothing" in told(config(tmp_path))


@pytest.mark.parametrize("place", ["mine", "mine/checkpoints"])
def test_a_folder_that_is_read_only(tmp_path, monkeypatch, place):
    (tmp_path / place).mkdir(parents=True)

    def read_only(dir: Path) -> None:
        if dir == tmp_path / place:
            raise OSError(30, "Read-only file system")
        return temporary(dir=dir)

    temporary = __import__("tempfile").TemporaryFile
    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    message = told(config(tmp_path))
    assert f"nothing can be written in {tmp_path / place} (Read-only file system)" in message


def test_the_kernels_own_folders_cannot_be_written():
    assert "nothing can be written in /proc" in (cannot_write(Path("/proc/runs")) or "")


def test_a_backend_that_is_not_there(tmp_path):
    wanted = config(tmp_path, "auto")
    wanted.train.backend = "te"
    message = told(wanted)
    assert "train.backend is te, but Transformer Engine is not installed here: pip" in message
    wanted.train.device = "cpu"
    assert "computes on CUDA alone, but train.device is cpu: set it to auto or" in told(wanted)


def test_cuda_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "train.device is cuda, but torch " in told(config(tmp_path, "cuda"))
    check_machine(config(tmp_path, "auto"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_machine(config(tmp_path, "cuda"), 2)
    assert "--nproc is 3, but this machine has 2" in told(config(tmp_path, "auto"), 3)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert "LOCAL_RANK is 2, but this machine has 2" in told(config(tmp_path, "cuda"))
    check_machine(config(tmp_path, "cpu"), 64)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.device=cuda", "train.device is cuda"),
        ("log.wandb.enabled=true", "there is no key for Weights & Biases"),
    ],
)
def test_it_is_told_before_data_are_prepared(tmp_path, monkeypatch, capsys, override, message):
    if override.startswith("log.wandb"):
        pytest.importorskip("wandb")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in {*environment(), "WANDB_API_KEY"} - {"HOME", "PATH"}:
        if name.startswith("WANDB"):
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["train", str(write_config(tmp_path)), override]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("variables", "size"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1"}, None),
        ({"WORLD_SIZE": ""}, None),
        ({"WORLD_SIZE": "8", "RANK": "0"}, None),
        ({"WORLD_SIZE": "8", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, 8),
        ({"WORLD_SIZE": "8", "RANK": "0", "MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": "x", "RANK": "0", "MASTER_ADDR": "a"}, "WORLD_SIZE is 'x'"),
    ],
)
def test_what_means_that_a_launcher_has_started_it(monkeypatch, variables, size):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(size, str):
        with pytest.raises(Exception, match=size):
            launched_world_size()
    else:
        assert launched_world_size() == size


def test_a_world_size_alone_starts_local_processes(tiny: TinyRuns, monkeypatch, capsys):
    started = []
    monkeypatch.setattr("attnres_train.commands.train.launch", lambda *a: started.append(a[1]) or 0)
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    override = "parallel.pipeline_model_parallel_size=2"
    assert main(["train", str(tiny.path), "run.name=local", override]) == 0
    assert started == [2]
