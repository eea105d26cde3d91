"""Folders of safetensors files as Kimi-Linear is released: shards of some GB and an index that says
which holds what. Names and shapes come from the caller, as tensors on the meta device."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from attnres_train.checkpoint.streaming import FILE_BYTES, in_groups
from attnres_train.errors import UserError
from attnres_train.words import some_of

INDEX = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
_FLOATS = ("BF16", "F16", "F32", "F64")


def released_dtype(name: str) -> torch.dtype:
    """bf16, but fp32 for the decay of KDA, as in moonshotai/Kimi-Linear-48B-A3B."""
    return torch.float32 if name.endswith((".A_log", ".dt_bias")) else torch.bfloat16


def write_weights(
    folder: Path,
    layout: dict[str, Tensor],
    load: Callable[[list[str]], dict[str, Tensor]],
    *,
    file_bytes: int = FILE_BYTES,
) -> int:
    """Write ``model-000NN-of-000MM.safetensors`` of up to ``file_bytes`` each, then the index.

    ``layout`` gives order, shapes and dtypes of the tensors; ``load`` the values of one file's. No
    more than these are in memory. Returns the number of files.
    """
    shards = in_groups(layout, lambda name: layout[name].nbytes, file_bytes)
    file_of: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(load(names), folder / file, metadata={"format": "pt"})
        file_of |= dict.fromkeys(names, file)
    total = sum(tensor.nbytes for tensor in layout.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return len(shards)


class Stored(NamedTuple):
    """What a file says of a tensor; ``dtype`` as safetensors writes it (``BF16``)."""

    file: str
    shape: list[int]
    dtype: str

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype} in {self.file}"


class ReleasedWeights:
    """The tensors in ``folder``, by name: looked up in the files' headers, read one at a time.

    Raises UserError where index or files are missing, damaged or contradict each other.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mapped: tuple[str, safe_open] | None = None
        self.tensors: dict[str, Stored] = {}
        listed = self._listed()
        for file in sorted(set(listed.values())):
            self.tensors |= self._header(file)
        absent = [
            f"{name} ({file})" for name, file in listed.items() if not self._is_in(name, file)
        ]
        if absent:
            raise UserError(
                f"{folder / INDEX} names tensors that their files lack: {some_of(absent)}"
            )

    def read(self, name: str) -> Tensor:
        """The values of a tensor, with shape and dtype as stored."""
        return self._open(self.tensors[name].file).get_tensor(name)

    def check_fit(self, wanted: dict[str, Tensor]) -> None:
        """Raise UserError, naming tensors and files, unless the names are those of ``wanted`` and
        shapes fit. Any float dtype does. ``A_log``, one value per head, may have any number of
        dimensions: released files differ in that."""
        lines = {
            "missing from its index": [name for name in wanted if name not in self.tensors],
            "not in the model of the config": [
                f"{name} ({stored.file})"
                for name, stored in self.tensors.items()
                if name not in wanted
            ],
            "of another kind": [
                f"{name} ({self.tensors[name]}, {list(tensor.shape)} by the config)"
                for name, tensor in wanted.items()
                if name in self.tensors and not _fits(name, self.tensors[name], tensor)
            ],
        }
        problems = [f"\n  {what}: {some_of(names)}" for what, names in lines.items() if names]
        if problems:
            raise UserError(f"{self.folder} does not fit the config:" + "".join(problems))

    def _listed(self) -> dict[str, str]:
        """File by tensor name, from the index; of a single file without one, its own list."""
        index = self.folder / INDEX
        if not index.is_file() and (self.folder / _SINGLE_FILE).is_file():
            return dict.fromkeys(self._header(_SINGLE_FILE), _SINGLE_FILE)
        try:
            return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except OSError as error:
            raise UserError(f"{index} cannot be read ({error.strerror})") from error
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{index} is damaged ({type(error).__name__}: {error})") from error

    def _header(self, file: str) -> dict[str, Stored]:
        opened = self._open(file)
        # Slices know shape and dtype from the header; no values are read. `keys` is called as
        # safe_open cannot be iterated over.
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {n: Stored(file, s.get_shape(), s.get_dtype()) for n, s in slices.items()}

    def _is_in(self, name: str, file: str) -> bool:
        return name in self.tensors and self.tensors[name].file == file

    def _open(self, file: str) -> safe_open:
        """The file, mapped into memory; the one mapped before is let go."""
        if self._mapped is None or self._mapped[0] != file:
            try:
                self._mapped = file, safe_open(self.folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{self.folder / file} cannot be read ({error})") from error
        return self._mapped[1]


def _fits(name: str, stored: Stored, wanted: Tensor) -> bool:
    shapes: Iterable[list[int]] = (stored.shape, list(wanted.shape))
    if name.endswith(".A_log"):
        shapes = ([size for size in shape if size != 1] for shape in shapes)
    found, expected = shapes
    return found == expected and stored.dtype in _FLOATS
