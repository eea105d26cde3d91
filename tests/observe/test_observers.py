"""Observers in isolation: who is told of what in which order, and what becomes of their errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from attnres_train.config import ConfigError, check_config, load_config
from attnres_train.config.section import Section
from attnres_train.errors import UserError
from attnres_train.observe.build import build_observers
from attnres_train.observe.dispatch import Observers
from attnres_train.observe.observer import Observer
from attnres_train.observe.sinks import read_records
from tests.observe.helpers import context
from tests.tiny import write_config

HERE = __name__
HOOKS = {
    Observer.on_start: (3,),
    Observer.on_step_begin: (4,),
    Observer.on_backward: (4, {}),
    Observer.on_validation: (4, 2.5),
    Observer.on_step_end: ({"step": 4},),
    Observer.on_observation: (4, {}),
    Observer.on_samples: (4, []),
    Observer.on_save: (4, Path("step_00000004")),
    Observer.on_roll_back: (3,),
    Observer.on_failure: (ValueError("why"),),
    Observer.on_end: (),
}


class Told(Observer):
    """Notes the hooks that are called; ``fails`` names those that raise."""

    def __init__(self, key: str = "log.observers.0", fails: tuple[str, ...] = ()) -> None:
        super().__init__(None, key)
        self.fails, self.hooks = fails, []
        self.error: type[Exception] = RuntimeError

    def hear(self, hook: str) -> None:
        self.hooks.append(hook)
        if hook in self.fails:
            raise self.error(f"{self.key} cannot {hook}")


for _hook in HOOKS:
    setattr(Told, _hook.__name__, lambda self, *told, name=_hook.__name__: self.hear(name))


class Everywhere(Observer):
    everywhere = True


class Adds(Observer):
    class Options(Section):
        value: float = 0.5

    def check(self, config):
        if self.options.value < 0:
            yield f"{self.key}.options.value is {self.options.value}: it cannot be below 0"

    def on_step_end(self, record):
        record["added"] = self.options.value * record["step"]


class Broken(Observer):
    def __init__(self, section, key, run=None):
        super().__init__(section, key, run)
        if run:
            raise ValueError("no sensor")


class Hasty(Observer):
    def __init__(self, section, key, run=None):
        super().__init__(section, key, run)
        self.folder = self.run.folder


class NoObserver:
    pass


def fits(observers: list[Observer], error: Exception | None = None) -> None:
    """A run that does nothing, or fails."""
    with Observers(observers).watching(0):
        if error:
            raise error


def notes(error) -> str:
    return "\n".join(error.value.__notes__)


def tell(observers: Observers, hook) -> None:
    """Tell one hook, whichever it is."""
    if hook is Observer.on_step_end:
        observers.tell_step_end({"step": 4}, after_save=False)
    else:
        observers.tell(hook, *HOOKS[hook])


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
def test_an_observer_that_fails_is_told_once_and_dropped(hook, capsys):
    before, fails, after = Told("a"), Told("log.observers.1", (hook.__name__,)), Told("c")
    observers = Observers([before, fails, after])
    tell(observers, hook)
    told = capsys.readouterr().err
    name = f"log.observers.1 ({HERE}:Told)"
    assert "Traceback" in told
    assert f"RuntimeError: log.observers.1 cannot {hook.__name__}" in told
    assert f"raised by observer {name} in {hook.__name__}" in told
    assert told.endswith(f"the run goes on without observer {name}\n")
    tell(observers, hook)
    assert before.hooks == after.hooks == [hook.__name__] * 2
    assert fails.hooks == [hook.__name__]
    assert not capsys.readouterr().err


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
@pytest.mark.parametrize("kind", ["everywhere", "on purpose"])
def test_what_ends_a_run_is_named(hook, kind):
    """Others may be waiting for one that is everywhere."""
    fails, after = Told("log.observers.1", (hook.__name__,)), Told("c")
    fails.everywhere = kind == "everywhere"
    fails.error = RuntimeError if fails.everywhere else UserError
    with pytest.raises(fails.error, match=f"log.observers.1 cannot {hook.__name__}") as error:
        tell(Observers([fails, after]), hook)
    assert notes(error) == (f"raised by observer log.observers.1 ({HERE}:Told) in {hook.__name__}")
    assert after.hooks == []


def test_every_hook_of_the_base_does_nothing():
    for hook, told in HOOKS.items():
        assert hook(Observer(None, "log"), *told) is None
    assert {hook.__name__ for hook in HOOKS} == {n for n in vars(Observer) if n.startswith("on_")}


def test_all_are_told_of_start_and_end():
    first, second = Told(), Told()
    fits([first, second])
    assert first.hooks == second.hooks == ["on_start", "on_end"]


def test_all_are_told_of_a_failure_whatever_they_do_then():
    first, second = Told("first", ("on_failure", "on_end")), Told("second", ("on_end",))
    cause = ValueError("the cause")
    with pytest.raises(ValueError, match="the cause") as error:
        fits([first, second], cause)
    assert error.value is cause
    assert first.hooks == second.hooks == ["on_start", "on_failure", "on_end"]
    for part in ("first cannot on_failure", "first cannot on_end", "second cannot on_end"):
        assert part in notes(error)
    assert f"raised by observer second ({HERE}:Told) in on_end" in notes(error)


def test_an_observer_may_raise_what_it_is_told_of():
    class Raises(Observer):
        def on_failure(self, error):
            raise error

    with pytest.raises(ValueError, match="the cause") as error:
        fits([Raises(None, "log.observers.0")], ValueError("the cause"))
    assert "Raises) in on_failure" in notes(error)
    assert "then" not in notes(error)


def test_an_interrupted_run_has_an_end_and_no_failure():
    told = Told()
    with pytest.raises(KeyboardInterrupt), Observers([told]).watching(0):
        raise KeyboardInterrupt
    assert told.hooks == ["on_start", "on_end"]


def test_what_fails_at_the_end_changes_no_end(capsys):
    first, second, third = Told("first", ("on_end",)), Told("second", ("on_end",)), Told("third")
    second.everywhere = True
    fits([first, second, third])
    assert third.hooks == ["on_start", "on_end"]
    told = capsys.readouterr().err
    assert "first cannot on_end" in told and "second cannot on_end" in told


def test_who_has_not_started_is_told_of_nothing_more(capsys):
    first, second, third = Told("first"), Told("second", ("on_start",)), Told("third")
    fits([first, second, third])
    assert first.hooks == third.hooks == ["on_start", "on_end"]
    assert second.hooks == ["on_start"]
    assert "second cannot on_start" in capsys.readouterr().err


def test_who_is_dropped_has_no_end():
    """It may wait for what has failed, such as the network."""
    told = Told("first", ("on_save",))
    observers = Observers([told])
    with observers.watching(0):
        tell(observers, Observer.on_save)
    assert told.hooks == ["on_start", "on_save"]


def test_a_record_is_written_before_the_save_and_shown_after_it(tmp_path):
    run = context(tmp_path, tensorboard=True, wandb={"enabled": True, "mode": "offline"})
    later = {type(observer).__name__: observer.after_save for observer in build_observers(run)}
    assert {name for name, after in later.items() if after} == {"Console", "TensorBoard", "Wandb"}
    before, after = Told("a"), Told("b")
    after.after_save = True
    Observers([before, after]).tell_step_end({"step": 1}, after_save=True)
    assert (before.hooks, after.hooks) == ([], ["on_step_end"])


def own(name: str, **options) -> list[dict]:
    return [{"kind": f"{HERE}:{name}", "options": options}]


def test_what_an_observer_adds_is_logged_with_the_rest(tmp_path):
    run = context(tmp_path, observers=own("Adds", value=1.5), progress="off", plot=False)
    observers = build_observers(run)
    values = {"loss": 1.0, "grad_norm": 1.0, "lr": 1.0, "step_seconds": 1.0, "memory_bytes": 1}
    with observers.watching(0):
        for after_save in (False, True):
            observers.tell_step_end(
                {"step": 2, "tokens_per_second": 1.0, **values}, after_save=after_save
            )
    (record,) = read_records(tmp_path / "metrics.jsonl")
    assert record["added"] == 3.0
    assert record["loss"] == 1.0


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (lambda record: record.update(loss=0.0), ValueError, "'loss'.* is not this observer's"),
        (lambda record: record.pop("loss"), ValueError, "'loss'.* is not this observer's"),
        (lambda record: record.update(x=torch.ones(())), TypeError, "'x'.* is a Tensor: add an"),
        (lambda record: record.update(x="text"), TypeError, "'x'.* is a str: add an int or float"),
    ],
)
def test_a_record_takes_new_numbers_alone(change, error, told, capsys):
    class Changes(Observer):
        def on_step_end(self, record):
            change(record)

    record = {"step": 1, "loss": 2.0}
    Observers([Changes(None, "log.observers.4")]).tell_step_end(record, after_save=False)
    screen = capsys.readouterr().err
    assert re.search(f"{error.__name__}: .*{told}", screen)
    assert "raised by observer log.observers.4" in screen
    assert record == {"step": 1, "loss": 2.0}


def test_an_observer_is_on_the_main_rank_unless_it_says_everywhere(tmp_path):
    names = [*own("Adds"), *own("Everywhere")]
    kinds = [
        [type(o).__name__ for o in build_observers(context(tmp_path, rank, observers=names))]
        for rank in (0, 1)
    ]
    assert kinds[0][:2] == ["Adds", "Everywhere"]
    assert {"JsonLines", "Console", "RunFacts"} <= set(kinds[0][2:])
    assert kinds[1] == ["Everywhere"]


def test_an_observer_that_cannot_be_made_is_named(tmp_path):
    with pytest.raises(ValueError, match="no sensor") as error:
        build_observers(context(tmp_path, observers=own("Broken")))
    assert notes(error) == f"raised by observer log.observers.0 ({HERE}:Broken) in __init__"


def test_options_are_checked_before_any_worker_starts(tmp_path):
    path = write_config(tmp_path)
    check_config(load_config(path, [f"log.observers=[{HERE}:Adds]"]))
    with pytest.raises(ConfigError, match=r"log.observers.0.options.value is -1.0: it cannot be"):
        check_config(load_config(path, [f"log.observers={own('Adds', value=-1)}"]))
    with pytest.raises(RuntimeError, match=r"log.observers.0: there is no run while .* on_start"):
        check_config(load_config(path, [f"log.observers=[{HERE}:Hasty]"]))


@pytest.mark.parametrize(
    ("observer", "told"),
    [
        ("no_such_lab.hooks:Any", "there is no module no_such_lab"),
        (f"{HERE}:Addz", f"has no Addz; did you mean {HERE}:Adds?"),
        (f"{HERE}:NoObserver", "is no Observer: derive the class from attnres_train.extend.Obs"),
        ("grad_norms", "expected module:Name of your own"),
        (
            f"{{kind: '{HERE}:Adds', options: {{valeu: 1}}}}",
            "unknown key; did you mean .*options.value",
        ),
        (f"{{kind: '{HERE}:Adds', options: {{value: x}}}}", "expected a number, not"),
    ],
)
def test_an_observer_that_is_not_to_be_had_is_an_error_of_the_configuration(
    tmp_path, observer, told
):
    path = write_config(tmp_path, log={"observers": own("Adds", value=2)})
    with pytest.raises(UserError, match=rf"^log\.observers\.0\.\S+ \(command line\).*{told}"):
        load_config(path, [f"log.observers=[{observer}]"])
