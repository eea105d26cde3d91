"""How a process's observers are told, and what becomes of their errors."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Concatenate, ParamSpec

from attnres_train.errors import UserError
from attnres_train.observe.observer import Observer, Record
from attnres_train.screen import complain

P = ParamSpec("P")
Hook = Callable[Concatenate[Observer, P], None]


class Observers:
    """The observers of a process, told in order. One that fails is dropped, see `Observer`."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._observers = list(observers)

    def __iter__(self) -> Iterator[Observer]:
        return iter(list(self._observers))

    def tell(self, hook: Hook[P], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call ``hook``, a method of `Observer`, on each. An exception that ends the run gets a
        note that names the observer."""
        for observer in self:
            with self._dropped_if_it_fails(observer, hook.__name__):
                getattr(observer, hook.__name__)(*args, **kwargs)

    def tell_step_end(self, record: Record, *, after_save: bool) -> None:
        """`Observer.on_step_end` on each of those with this ``after_save``. What one adds to
        ``record`` is in it for the next ones; one that changes what was there, or adds no number,
        has failed."""
        for observer in self:
            if observer.after_save == after_save:
                offered = dict(record)
                with self._dropped_if_it_fails(observer, "on_step_end"):
                    observer.on_step_end(offered)
                    record.update(_added(record, offered))

    @contextmanager
    def watching(self, step: int) -> Iterator[None]:
        """Tell of a run that is the context: its start after ``step``, its failure, its end.

        Failure and end are told to every observer whose `on_start` returned, whatever the others
        do. The error that ended the run is the one that leaves the context: those of observers
        that are told of it become notes of it. After the end of a run that is done, nothing can
        fail any more: errors are told.
        """
        started: list[Observer] = []
        try:
            for observer in self:
                with self._dropped_if_it_fails(observer, "on_start"):
                    observer.on_start(step)
                    started.append(observer)
            yield
        except BaseException as error:
            late = []
            left = [observer for observer in started if observer in self._observers]
            if isinstance(error, Exception):
                late += _tell_all(left, Observer.on_failure, error)
            _note(error, [other for _, other in late + _tell_all(left, Observer.on_end)])
            raise
        left = [observer for observer in started if observer in self._observers]
        for observer, problem in _tell_all(left, Observer.on_end):
            complain(f"{_told(observer, problem)}\nthe run is done all the same")

    @contextmanager
    def _dropped_if_it_fails(self, observer: Observer, method: str) -> Iterator[None]:
        try:
            with named(observer.key, type(observer), method):
                yield
        except UserError:
            raise
        except Exception as error:
            if observer.everywhere:  # its peers may be in a call of their own, waiting for it
                raise
            self._observers.remove(observer)
            complain(f"{_told(observer, error)}\nthe run goes on without {_name(observer)}")


def _name(observer: Observer) -> str:
    kind = type(observer)
    return f"observer {observer.key} ({kind.__module__}:{kind.__qualname__})"


def _told(observer: Observer, error: Exception) -> str:
    """What ``error`` of ``observer`` was: of the user's with the place, also of ours unless it is
    the system's."""
    if isinstance(error, OSError) and type(observer).__module__.startswith(__package__):
        return f"{_name(observer)}: {error}"
    return "".join(traceback.format_exception(error)).rstrip()


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
) -> list[tuple[Observer, Exception]]:
    """Call ``hook`` on each, also when one fails. Returns the exceptions, and whose they are."""
    errors = []
    for observer in observers:
        try:
            with named(observer.key, type(observer), hook.__name__):
                getattr(observer, hook.__name__)(*args, **kwargs)
        except Exception as error:
            errors.append((observer, error))
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
