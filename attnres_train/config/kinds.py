"""Kinds: what a configuration names where there is a choice, be it of residual, of learning-rate
schedule or of corpus reader.

A name is one of ours, listed in `CHOICES`, or a class of the user's as ``module:Name``. Either way
it leads to a class, imported when it is used, that holds all that is to be known of the kind:
whoever needs to know asks that class, and no other list of kinds exists. The modules named here are
light: what a kind does once a run starts (and torch) is imported by the kind itself.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from attnres_train.config.errors import ConfigError
from attnres_train.config.section import Section


class NoOptions(Section):
    """The options of a kind that has none of its own."""


class Kind:
    """What a configuration names by ``kind``: a base of the bases in `CHOICES`.

    ``section`` is the section that names the kind, ``key`` its dotted place (``data.corpus.0``).
    A class declares options of its own as a nested ``Options``, a `Section`; they are written below
    ``options`` in the same section.
    """

    Options: ClassVar[type[Section]] = NoOptions

    def __init__(self, section: Any, key: str) -> None:
        self.section, self.key = section, key

    @property
    def options(self) -> Any:
        """The checked `Options` of the configuration."""
        return self.section.options

    @classmethod
    def about(cls) -> str:
        """The first sentence or so of the class's docstring: what the kind is."""
        text = inspect.cleandoc(cls.__doc__ or cls.__name__)
        return " ".join(text.split("\n\n")[0].split())

    def check(self, config: Any) -> Iterator[str]:
        """What speaks against running ``config``, a `RunConfig`, with this kind: a line each, with
        the user's key and what to do. Called before any worker starts."""
        yield from ()

    def check_files(self) -> Iterator[str]:
        """What is missing of the files that its section names: a line each, as of `check`. Called
        where they are needed, not to plan a run elsewhere."""
        yield from ()


@dataclass(frozen=True)
class Choice:
    """The kinds that a key may name; classes as ``module:Name``."""

    base: str
    """The class that every one derives from."""
    built_in: Mapping[str, str]
    """Ours, by the name in the configuration."""


_PACKAGE = "attnres_train."
_RESIDUAL, _CORPORA = "attnres_train.model.residual.", "attnres_train.data.corpora."
_TOKENIZERS = "attnres_train.data.tokenizers."
CHOICES: dict[str, Choice] = {
    "model.residual.kind": Choice(
        _RESIDUAL + "kind:ResidualKind",
        {
            "standard": _RESIDUAL + "kinds:Standard",
            "full": _RESIDUAL + "kinds:Full",
            "block": _RESIDUAL + "kinds:Block",
            "dense_former": _RESIDUAL + "kinds:DenseFormerKind",
            "mhc_lite": _RESIDUAL + "kinds:HyperConnectionsKind",
        },
    ),
    "pipeline.schedule": Choice(
        _PACKAGE + "pipeline.plan.schedule_kinds:PipelineSchedule",
        {
            "1f1b": _PACKAGE + "pipeline.plan.schedule_kinds:OneFOneB",
            "gpipe": _PACKAGE + "pipeline.plan.schedule_kinds:GPipe",
        },
    ),
    "optimizer.kind": Choice(
        _PACKAGE + "optim.kinds:OptimizerKind",
        {
            "muon": _PACKAGE + "optim.kinds:MuonKind",
            "adamw": _PACKAGE + "optim.kinds:AdamWKind",
        },
    ),
    "lr_schedule.kind": Choice(
        _PACKAGE + "optim.schedules:LRSchedule",
        {
            "cosine": _PACKAGE + "optim.schedules:Cosine",
            "wsd": _PACKAGE + "optim.schedules:WarmupStableDecay",
            "constant": _PACKAGE + "optim.schedules:Constant",
        },
    ),
    "data.corpus.kind": Choice(
        _CORPORA + "reader:CorpusReader",
        {
            "python-stdlib": _CORPORA + "text:PythonStdlib",
            "text": _CORPORA + "text:Text",
            "jsonl": _CORPORA + "records:JsonLines",
            "parquet": _CORPORA + "records:Parquet",
            "datasets": _CORPORA + "saved_dataset:SavedDataset",
            "indexed": _CORPORA + "indexed:Indexed",
        },
    ),
    "data.tokenizer.kind": Choice(
        _TOKENIZERS + "kind:TokenizerKind",
        {
            "bpe": _TOKENIZERS + "hugging_face:BytePairs",
            "file": _TOKENIZERS + "hugging_face:TokenizerJson",
            "tiktoken": _TOKENIZERS + "rank_file:RankFile",
            "sentencepiece": _TOKENIZERS + "sentence_piece:SentencePiece",
            "none": _TOKENIZERS + "kind:NoTokenizer",
        },
    ),
    "log.observers.kind": Choice(_PACKAGE + "observe.observer:Observer", {}),
}
"""Every key that names a kind (list elements without their index)."""


def resolve(choice: str, name: str) -> type[Any]:
    """The class that ``name`` stands for where `CHOICES` has ``choice``.

    Raises ConfigError where a class of the user's cannot be imported or is not of that choice.
    """
    table = CHOICES[choice]
    found = _load(table.built_in.get(name, name))
    base = _load(table.base)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(
            f"{name} is no {base.__name__}: derive the class from "
            f"attnres_train.extend.{base.__name__} (see docs/extending.md)"
        )
    if lacks := ", ".join(sorted(getattr(found, "__abstractmethods__", ()))):
        raise ConfigError(f"{name} is not complete: it has no {lacks} (see docs/extending.md)")
    return found


def kinds_of(config: Any, choice: str) -> list[Any]:
    """The kinds that ``config``, a `RunConfig`, names at ``choice``: those of a list in its order,
    else one.

    Raises ConfigError as `resolve`.
    """
    if choice == "model.residual.kind":
        return [config.model.residual_kind]  # what it is made of is the whole model section
    place, _, key = choice.rpartition(".")
    found = functools.reduce(getattr, place.split("."), config)
    if not isinstance(found, list):
        return [resolve(choice, getattr(found, key))(found, place)]
    return [
        resolve(choice, getattr(section, key))(section, f"{place}.{number}")
        for number, section in enumerate(found)
    ]


def kind_of(config: Any, choice: str) -> Any:
    """The one kind that ``config``, a `RunConfig`, names at ``choice``: ``lr_schedule.kind``, say.

    Raises ConfigError as `resolve`.
    """
    (kind,) = kinds_of(config, choice)
    return kind


def _load(target: str) -> Any:
    module_name, _, attribute = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"there is no module {error.name}: start in the folder that holds it (now "
                f"{os.getcwd()}), install it, or put its folder on PYTHONPATH"
            ) from None
        raise ConfigError(f"module {module_name} cannot be imported: {error}") from error
    except Exception as error:  # whatever the user's module raises
        told = f"{type(error).__name__}: {error}"
        raise ConfigError(f"module {module_name} cannot be imported: {told}") from error
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        meant = f"; did you mean {module_name}:{near[0]}?" if near else ""
        file = getattr(module, "__file__", None) or "built into Python"
        raise ConfigError(f"module {module_name} ({file}) has no {attribute}{meant}")
    return getattr(module, attribute)
