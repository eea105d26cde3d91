"""The error of a configuration that cannot be run."""

from __future__ import annotations

from collections.abc import Sequence

from attnres_train.errors import UserError


class ConfigError(UserError):
    """One or more problems, each told with the user's key, where it stands and what to do."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        if len(self.problems) == 1:
            message = self.problems[0]
        else:
            message = "\n  ".join([f"{len(self.problems)} problems:", *self.problems])
        super().__init__(message)
