"""How a process's observers are told, and what becomes of their errors."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Concatenate, ParamSpec

from attnres_train.observe.observer import Observer, Record

P = ParamSpec("P")
Hook = Callable[Concatenate[Observer, P], None]


class Observers:
    """The observers of a process, told in order."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._observers = observers

    def __iter__(self) -> Iterator[Observer]:
        return iter(self._observers)

    def tell(self, hook: Hook[P], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call ``hook``, a method of `Observer`, on each. An exception gets a note that names the
        observer, and goes on to the caller."""
        for observer in self:
            with named(observer.key, type(observer), hook.__name__):
                getattr(observer, hook.__name__)(*args, **kwargs)

    def tell_step_end(self, record: Record) -> None:
        """`Observer.on_step_end` on each. What one adds to ``record`` is in it for the next ones.
        Raises ValueError where one changes what was there, TypeError where it adds no number."""
        for observer in self:
            offered = dict(record)
            with named(observer.key, type(observer), "on_step_end"):
                observer.on_step_end(offered)
                record.update(_added(record, offered))

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Tell of a run that is the context: its start after ``step``, its failure, its end.

        Failure and end are told to every observer whose `on_start` returned, whatever the others
        do. The error that ended the run is the one that leaves the context: those of observers
        that are told of it become notes of it.
        """
        started: list[Observer] = []
        try:
            for observer in self:
                Observers([observer]).tell(Observer.on_start, step)
                started.append(observer)
            yield
        except BaseException as error:
            late = []
            if isinstance(error, Exception):
                late += _tell_all(started, Observer.on_failure, error)
            _note(error, late + _tell_all(started, Observer.on_end))
            raise
        late = _tell_all(started, Observer.on_end)
        if late:
            _note(late[0], late[1:])
            raise late[0]


@contextmanager
def named(key: str, observer: type[Observer], method: str) -> Iterator[None]:
    """Note on exceptions that they come from ``method`` of the observer of ``key``."""
    try:
        yield
    except Exception as error:
        name = f"{observer.__module__}:{observer.__qualname__}"
        error.add_note(f"raised by observer {key} ({name}) in {method}")
        raise


def _tell_all(
    observers: Sequence[Observer], hook: Hook[P], *args: P.args, **kwargs: P.kwargs
) -> list[Exception]:
    """Call ``hook`` on each, also when one fails. Returns the exceptions."""
    errors = []
    for observer in observers:
        try:
            Observers([observer]).tell(hook, *args, **kwargs)
        except Exception as error:
            errors.append(error)
    return errors


def _note(error: BaseException, later: Sequence[Exception]) -> None:
    """Tell of ``later`` errors in notes of ``error``, which came before them and may be among them
    (an observer that raises what it is told of)."""
    for other in later:
        if other is not error:
            *_, place = traceback.extract_tb(other.__traceback__)
            told = [f"{type(other).__name__}: {other} ({place.filename}:{place.lineno})"]
            error.add_note("\n  ".join(["then:", *told, *getattr(other, "__notes__", ())]))


def _added(record: Record, offered: Record) -> Record:
    """What ``offered``, a copy of ``record`` that an observer has had, holds beyond it."""
    for name, value in record.items():
        if offered.get(name) is not value:
            raise ValueError(f"record[{name!r}] is not this observer's: add under a new name")
    added = {name: value for name, value in offered.items() if name not in record}
    for name, value in added.items():
        if not isinstance(value, int | float):
            raise TypeError(
                f"record[{name!r}] is a {type(value).__name__}: add an int or float (.item() of a "
                "tensor or array)"
            )
    return added
