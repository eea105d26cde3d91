"""JSON that ends with a checksum of itself: a changed byte anywhere in it is found."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnres_train.checkpoint.crc import crc32

_SEAL = b', "crc32": '


def seal(content: Mapping[str, Any]) -> bytes:
    """``content`` as JSON, with the CRC-32 of all that stands before it as its last key."""
    body = json.dumps(content).encode()[:-1]
    return body + _SEAL + b"%d}\n" % crc32(body)


def is_sealed(data: bytes) -> bool:
    """Whether ``data`` is, byte for byte, what `seal` has made."""
    body, _, end = data.rpartition(_SEAL)
    return end == b"%d}\n" % crc32(body)


def write_file(path: Path, data: bytes) -> None:
    """Write ``data`` and return once it is on the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Return once creations and renames in ``folder`` are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
