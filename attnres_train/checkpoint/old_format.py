"""Checkpoints of before: format 1, files of torch.distributed.checkpoint. They are read only."""

from __future__ import annotations

import warnings

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from attnres_train.checkpoint.crc import crc32
from attnres_train.checkpoint.manifest import Manifest
from attnres_train.checkpoint.old_metadata import SafeReader
from attnres_train.checkpoint.tensor_file import bytes_of, view_of


def read_old(manifest: Manifest, tensors: dict[str, Tensor]) -> list[str]:
    """Fill ``tensors``, by name, in place, on this rank alone. Returns what went wrong: names of
    tensors with other bytes than were saved, or why nothing could be read."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            # Without collectives: where one rank's file cannot be read, the others would wait.
            reader = SafeReader(manifest.folder)
            dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
    except CheckpointException as error:  # no Exception
        _, (cause, _) = next(iter(error.failures.items()))
        return [f"cannot be read ({type(cause).__name__}: {cause})"]
    saved = manifest.tensors
    return [name for name, t in tensors.items() if [_crc32(t)] != [*saved[name].checksums.values()]]


def _crc32(tensor: Tensor) -> int:
    # Of what is in memory, not in the files: it has arrived in pieces.
    return crc32(view_of(bytes_of(tensor.cpu())))
