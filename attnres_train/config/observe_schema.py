"""What is looked at while a run trains (`observe`)."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from attnres_train.config.section import Section


class ProfileConfig(Section):
    steps: list[int] | None = Field(None, min_length=2, max_length=2)
    """First and last step to profile, e.g. `[20, 22]`; none: nothing is profiled."""
    ranks: list[int] = Field([0], min_length=1)
    """Ranks that are profiled, each into a file of its own."""

    @field_validator("steps")
    @classmethod
    def _in_order(cls, value: list[int] | None) -> list[int] | None:
        if value and not 1 <= value[0] <= value[1]:
            raise ValueError(
                f"{value} are not a first and a last step: both count from 1, the last is not "
                "before the first"
            )
        return value

    @field_validator("ranks", mode="before")
    @classmethod
    def _one_alone(cls, value: Any) -> Any:
        return [value] if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("ranks")
    @classmethod
    def _from_zero(cls, value: list[int]) -> list[int]:
        if min(value) < 0:
            raise ValueError(f"{value}: ranks count from 0")
        return value


class ObserveConfig(Section):
    interval: int = Field(100, ge=0)
    """Steps between observations of one micro-batch: depth-attention weights, magnitudes, gradient
    and query norms, expert load, block store (see docs/observing.md); the last step is observed
    too. 0: none. What is trained does not depend on it."""
    keep: int = Field(200, ge=2)
    """Observations that are kept in the run folder. Beyond them some are dropped, so that the rest
    stay spread over the run; first and latest are always there."""
    profile: ProfileConfig = Field(default_factory=ProfileConfig)
    """Trace of a few steps by torch's profiler."""
