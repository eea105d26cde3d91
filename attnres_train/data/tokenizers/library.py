"""What the libraries that tokenise raise, made one message."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from attnres_train.data.own_code import failures_as
from attnres_train.errors import UserError


def told(what: str) -> AbstractContextManager[None]:
    """Make what a library raises a UserError: ``what``, and what the library says."""

    def text(error: BaseException) -> str:
        said = " ".join(str(error).split()) or type(error).__name__
        return f"{what}: {said[:300]}"

    return failures_as(text)


def read_bytes(path: Path, key: str = "data.tokenizer.path") -> bytes:
    """The content of ``path``. Raises UserError where it cannot be read, or is empty."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read: {error.strerror}") from error
    if not content:
        raise UserError(f"{key}: {path} is empty")
    return content


def missing_ids(ids: set[int], most: int = 8) -> list[int]:
    """The first ``most`` ids below the largest of ``ids`` that are not among them."""
    if max(ids, default=-1) + 1 == len(ids):
        return []
    missing: list[int] = []
    expected = 0
    for found in sorted(ids):
        # However wide the hole is: a rank may say 2**40.
        missing += range(expected, min(found, expected + most))
        expected = found + 1
        if len(missing) >= most:
            break
    return missing[:most]
