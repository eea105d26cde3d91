"""What the libraries that tokenise raise, made one message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attnres_train.data.own_code import is_failure
from attnres_train.errors import UserError


@contextmanager
def told(what: str) -> Iterator[None]:
    """Make what a library raises a UserError: ``what``, and what the library says.

    Libraries written in Rust raise bare Exceptions, or panic. UserErrors pass.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what}: {said[:300]}") from error


def read_bytes(path: Path, key: str = "data.tokenizer.path") -> bytes:
    """The content of ``path``. Raises UserError where it cannot be read, or is empty."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read: {error.strerror}") from error
    if not content:
        raise UserError(f"{key}: {path} is empty")
    return content


def some(things: list[str], most: int = 12) -> str:
    """A list for a message: the first ``most``, and how many more there are."""
    more = f" and {len(things) - most:,} more" if len(things) > most else ""
    return ", ".join(things[:most]) + more


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
