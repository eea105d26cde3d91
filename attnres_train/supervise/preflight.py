"""What can be known of this machine before a run costs anything: whether its folders can be
written, and whether its devices are there."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from attnres_train.config.errors import ConfigError
from attnres_train.config.schema import RunConfig


def check_machine(config: RunConfig, local_processes: int | None = None) -> None:
    """Raise ConfigError with all that this machine lacks. Leaves nothing on the disk.

    ``local_processes`` are those that will be started here; None: this is one that was started.
    """
    problems = [
        *_folder_problems(config),
        *device_problems(config.train.device, local_processes),
        *_backend_problems(config),
    ]
    if problems:
        raise ConfigError(problems)


def _folder_problems(config: RunConfig) -> Iterator[str]:
    folder = Path(config.run.dir, config.run.name)
    if why := cannot_write(folder):
        made = "written" if folder.is_dir() else "made"
        yield f"run.dir: the run folder {folder} cannot be {made}: {why}"
    elif why := cannot_write(folder / "checkpoints"):
        yield (
            f"run.dir: checkpoints cannot be written to {folder / 'checkpoints'}: {why}; mend "
            "that, or choose another run.name"
        )


def cannot_write(folder: Path) -> str | None:
    """Why nothing can be written in ``folder``, which need not be there; None where it can."""
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not nearest.is_dir():
        return f"{nearest} is a {'file' if nearest.exists() else 'link to nothing'}"
    try:
        # It has no name where the system can do that, and is gone at once elsewhere.
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(b"\0")
            file.flush()
    except OSError as error:
        return f"nothing can be written in {nearest} ({error.strerror or error})"
    return None


def _backend_problems(config: RunConfig) -> Iterator[str]:
    if config.train.backend != "te":
        return
    other = "set it to auto or torch"
    if importlib.util.find_spec("transformer_engine") is None:
        yield (
            "train.backend is te, but Transformer Engine is not installed here: pip install "
            f"'attnres-train[gpu]' (NVIDIA's PyTorch containers have it), or {other}"
        )
    if config.train.device == "cpu":
        yield f"train.backend is te, which computes on CUDA alone, but train.device is cpu: {other}"


def device_problems(
    device: str, local_processes: int | None, key: str = "train.device"
) -> Iterator[str]:
    """What this machine lacks of ``device`` (cpu, cuda or auto), which the user gives as ``key``;
    ``local_processes`` as for `check_machine`."""
    if device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        if device == "cuda":
            built = torch.version.cuda
            with_cuda = f"built for CUDA {built}" if built else "built without CUDA"
            yield (
                f"{key} is cuda, but torch {torch.__version__} ({with_cuda}) finds no CUDA "
                "device here: set it to cpu or auto, or mend torch or driver (see attnres-train "
                "doctor)"
            )
        return
    count = torch.cuda.device_count()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_processes is not None and local_processes > count:
        yield (
            f"--nproc is {local_processes}, but this machine has {count} CUDA devices, one for "
            f"each process: start fewer, or set {key} to cpu"
        )
    elif local_processes is None and local_rank >= count:
        yield (
            f"LOCAL_RANK is {local_rank}, but this machine has {count} CUDA devices: start fewer "
            f"processes per machine, or set {key} to cpu"
        )
