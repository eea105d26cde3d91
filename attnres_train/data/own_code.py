"""Errors of a kind's own code (`config.kinds.Kind`), told so that its author finds the place."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from attnres_train.config.kinds import Kind
from attnres_train.errors import UserError


def errors_of(kind: Kind, doing: str) -> AbstractContextManager[None]:
    """Make what ``kind``'s code raises a UserError that names the key, the kind, what it was
    ``doing`` and the line. Its own UserErrors say enough, and pass."""
    return failures_as(
        lambda error: (
            f"{kind.key}.kind {kind.section.kind} failed at {doing}: {type(error).__name__}: "
            f"{error} ({_place(kind, error)})"
        )
    )


@contextmanager
def failures_as(told: Callable[[BaseException], str]) -> Iterator[None]:
    """Make whatever fails a UserError with the text that ``told`` makes of it. UserErrors pass, and
    what is no failure (Ctrl-C). A library written in Rust that panics raises no Exception (pyo3's
    PanicException), but has failed."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(told(error)) from error


def _place(kind: Kind, error: BaseException) -> str:
    """The last line of the kind's own file on the way to ``error``, not one of a library below."""
    frames = traceback.extract_tb(error.__traceback__)
    file = getattr(sys.modules.get(type(kind).__module__), "__file__", None)
    last = ([frame for frame in frames if frame.filename == file] or frames)[-1]
    return f"{last.filename}, line {last.lineno}"


def interruptible(work: Callable[[], None]) -> None:
    """Do ``work``, and raise what it raises; Ctrl-C is heard at once, also while a library that is
    not Python computes. What it then does is ended with the process."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # a panic is no Exception
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
