"""Errors of a kind's own code (`config.kinds.Kind`), told so that its author finds the place."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from attnres_train.config.kinds import Kind
from attnres_train.errors import UserError


@contextmanager
def errors_of(kind: Kind, doing: str) -> Iterator[None]:
    """Make what ``kind``'s code raises a UserError that names the key, the kind, what it was
    ``doing`` and the line. Its own UserErrors say enough, and pass."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        raise UserError(
            f"{kind.key}.kind {kind.section.kind} failed at {doing}: {type(error).__name__}: "
            f"{error} ({_place(kind, error)})"
        ) from error


def is_failure(error: BaseException) -> bool:
    """Whether something failed: not so when Ctrl-C ends it, but when a library written in Rust
    panics, which is no Exception (pyo3's PanicException)."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _place(kind: Kind, error: BaseException) -> str:
    """The last line of the kind's own file on the way to ``error``, not one of a library below."""
    frames = traceback.extract_tb(error.__traceback__)
    file = getattr(sys.modules.get(type(kind).__module__), "__file__", None)
    last = ([frame for frame in frames if frame.filename == file] or frames)[-1]
    return f"{last.filename}, line {last.lineno}"
