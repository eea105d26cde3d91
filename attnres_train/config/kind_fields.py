"""Fields of the schema that name a kind, or hold the options of one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, SerializeAsAny, ValidationInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from attnres_train.config.errors import ConfigError
from attnres_train.config.kinds import CHOICES, NoOptions, resolve
from attnres_train.config.paths import TOLD_AS_IT_IS
from attnres_train.config.section import Section

_OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
KIND_ERROR = TOLD_AS_IT_IS


@dataclass(frozen=True)
class KindName:
    """Annotation of a ``str`` field that names a kind of ``choice``."""

    choice: str

    @property
    def expected(self) -> str:
        """What a value must be, in words."""
        names = list(CHOICES[self.choice].built_in)
        own = "module:Name of your own"
        return f"one of {', '.join(names)}, or {own}" if names else own

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        names = list(CHOICES[self.choice].built_in)
        own = {"type": "string", "pattern": f"^{_OWN.pattern}$"}
        return {"anyOf": [{"enum": names}, own]} if names else own

    def _checked(self, name: str) -> str:
        if name in CHOICES[self.choice].built_in:
            return name
        if not _OWN.fullmatch(name):
            raise ValueError(self.expected)
        _told_as_it_is(lambda: resolve(self.choice, name))
        return name


def _told_as_it_is(action: Callable[[], Any]) -> Any:
    """The result of ``action``; its ConfigError as a validation error that is told as it is."""
    try:
        return action()
    except ConfigError as error:
        raise PydanticCustomError(KIND_ERROR, "{told}", {"told": str(error)}) from None


def options_class(choice: str, name: str) -> type[Section]:
    """The `Kind.Options` of kind ``name``."""
    return resolve(choice, name).Options


@dataclass(frozen=True)
class OptionsOf:
    """Annotation of a field of `KindOptions`: those of the kind that the field ``by``, which comes
    before it in the same section, names."""

    choice: str
    by: str = "kind"

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.with_info_before_validator_function(self._checked, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"type": "object"}

    def _checked(self, value: Any, info: ValidationInfo) -> Section:
        name = info.data.get(self.by)
        given = value.model_dump() if isinstance(value, Section) else value
        if name is None or (not given and name in CHOICES[self.choice].built_in):
            return NoOptions()  # an unknown kind is an error of its own
        options = _told_as_it_is(lambda: options_class(self.choice, name))
        return options.model_validate({} if given is None else given)


KindOptions = SerializeAsAny[Section]
"""Type of a field that holds the options of a kind: ``Annotated[KindOptions, OptionsOf(...)]``."""
