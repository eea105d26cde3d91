"""A run in stages, each a configuration of its own.

In a `RunConfig` every stage is whole, and what stands outside of `stages` is one of them: the first
as it is loaded, any other as `stage_configs` gives it. So whoever has no business with stages reads
a configuration like that of a run without.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from attnres_train.config.schema import RunConfig
from attnres_train.config.section import Section
from attnres_train.config.stage_values import SECTIONS, keys


def stage_configs(config: RunConfig) -> list[RunConfig]:
    """The configuration as it is in each stage, `stages` and all; itself alone where there are
    none."""
    return [
        config.model_copy(
            update={name: _over(getattr(config, name), getattr(stage, name)) for name in SECTIONS}
        )
        for stage in config.stages
    ] or [config]


def _over(base: Section, stage: Section) -> Section:
    """``base`` with the values of ``stage``, which has some of its keys, or all."""
    if type(base) is type(stage):
        return stage
    return base.model_copy(
        update={
            name: _over(getattr(base, name), value) if isinstance(value, Section) else value
            for name, value in stage
        }
    )


def called(config: RunConfig, number: int) -> str:
    """Stage ``number`` in words; "" where there are no stages."""
    if not config.stages:
        return ""
    return f"stage {config.stages[number].name} ({number + 1} of {len(config.stages)})"


def named(config: RunConfig, number: int, text: str) -> str:
    """``text``, a problem of stage ``number``, with the stage's own keys: `stages.1.train...`."""
    if not config.stages:
        return text
    pattern = "|".join(re.escape(key) for key in keys())
    return re.sub(rf"(?<![\w.])(?={pattern})", f"stages.{number}.", text)


def named_once(config: RunConfig, by_stage: Sequence[Sequence[str]]) -> list[str]:
    """The problems of all stages, each once: one that is every stage's is the base's."""
    shared = [text for text in by_stage[0] if all(text in other for other in by_stage)]
    own = [
        named(config, number, text)
        for number, problems in enumerate(by_stage)
        for text in problems
        if text not in shared
    ]
    return shared + list(dict.fromkeys(own))
