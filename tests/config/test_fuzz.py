"""Random configs and overrides, drawn from the schema, end in a valid plan or in a message that
names a key: never in a traceback."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnres_train.config import check_config, load_config
from attnres_train.config.fields import all_keys, as_written, holds_sections, inner_section
from attnres_train.config.kind_fields import KindName
from attnres_train.config.kinds import CHOICES, kind_of
from attnres_train.config.schema import RunConfig
from attnres_train.errors import UserError
from attnres_train.pipeline.plan.validate import validate
from attnres_train.planning.build import build_plan
from tests.config.conftest import SMALL

INTEGERS = st.integers(-2, 9) | st.sampled_from([16, 64, 300, 10**12, -(10**30)])
NUMBERS = st.floats(allow_nan=True) | st.sampled_from([0, 0.0, 0.5, 1, -1, 1e-9, 1e300])
TEXTS = st.text(max_size=6) | st.sampled_from(
    ["auto", "even", "Et*3|(tt|)*2ttL", "~", "$NOT_THERE", "*.jsonl", "a\0b", "x:Y", "os:path", "/"]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | INTEGERS | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
LEAVES = [key for key in all_keys() if not holds_sections(key)]


def field_of(key: str) -> Any:
    section: Any = RunConfig
    *outer, name = key.split(".")
    for step in outer:
        section = inner_section(section.model_fields[step].annotation)
    return section.model_fields[name]


def values_of(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of the type, in or out of its bounds."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return st.one_of(map(values_of, args))
    if origin is Literal:
        return st.sampled_from(args)
    if origin is list:
        return st.lists(values_of(args[0]), max_size=4)
    if origin is tuple:
        return st.tuples(*map(values_of, args)).map(list)
    simple = {int: INTEGERS, float: NUMBERS, str: TEXTS, bool: st.booleans(), type(None): st.none()}
    return simple.get(annotation, st.dictionaries(TEXTS, ANYTHING, max_size=2))


@st.composite
def overrides(draw: st.DrawFn) -> str:
    key = draw(st.sampled_from(LEAVES))
    field = field_of(key)
    names = [
        name
        for note in field.metadata
        if isinstance(note, KindName)
        for name in CHOICES[note.choice].built_in
    ]
    fitting = st.sampled_from(names) if names else values_of(field.annotation)
    value = draw(st.one_of(fitting, fitting, fitting, ANYTHING))
    written = draw(st.sampled_from([json.dumps(value), json.dumps(value), str(value)]))
    return f"{as_written(key)}={written}"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "small.yaml"
    path.write_text(SMALL)
    return path


def attempt(file: Path, words: list[str]) -> None:
    """Load, check and plan under overrides ``words``, as before a run."""
    try:
        config = load_config(file, words)
        check_config(config)
        plan = build_plan(config)
        schedule: Any = kind_of(config, "pipeline.schedule")
        layout = plan.layout
        if layout.num_ranks * layout.num_chunks <= 256:
            validate(plan, schedule.schedule(layout.num_ranks, layout.num_virtual_stages, 4))
    except UserError as error:
        named = {key.rpartition(".")[2] for key in all_keys()} | set(RunConfig.model_fields)
        assert any(name in str(error) for name in named), str(error)


@settings(max_examples=300)
@given(words=st.lists(overrides(), min_size=1, max_size=4))
def test_overrides_end_in_a_plan_or_in_a_message(file: Path, words: list[str]) -> None:
    attempt(file, words)


@pytest.mark.nightly
@settings(max_examples=5000)
@given(words=st.lists(overrides(), min_size=1, max_size=8))
def test_thousands_of_overrides(file: Path, words: list[str]) -> None:
    attempt(file, words)
