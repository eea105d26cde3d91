"""Over which processes a model is spread that has been trained over others."""

from __future__ import annotations

from collections.abc import Sequence

from attnres_train.config.checks import grid_problems, one_by_one_problems
from attnres_train.config.errors import ConfigError
from attnres_train.config.loader import config_of, plain_values
from attnres_train.config.schema import RunConfig
from attnres_train.config.tree import Tree
from attnres_train.errors import UserError

WAY_ON = (
    "spread the model by parallel.pipeline_model_parallel_size and "
    "parallel.expert_model_parallel_size, which load the weights of any layout"
)


def on_grid(saved: RunConfig, overrides: Sequence[str], asked: int | None) -> tuple[RunConfig, int]:
    """``saved`` with the grid on which its model writes text, and the number of its processes.

    The grid is that of the ``overrides``, all of them keys of ``parallel``, of which the others
    have their defaults then; else the run's own. ``asked`` is the number of processes; None: as few
    as hold the model with ``overrides``, and one without.

    Raises UserError where this cannot be, or leaves processes with nothing of their own to do.
    """
    for override in overrides:
        if not override.strip().startswith("parallel."):
            key = override.partition("=")[0]
            raise UserError(f"{key}: only keys of parallel are given here: {WAY_ON}")
    if overrides:
        values = plain_values(saved) | {"parallel": {}}
        config = config_of(Tree(values, {(): "the run"}), overrides)
    else:
        # How tokens travel in training is nothing that weights or texts depend on.
        grid = saved.parallel.model_copy(update={"expert_dispatcher": "exact"})
        config = saved.model_copy(update={"parallel": grid})
        if asked in (None, 1):
            return config, 1
    count = config.parallel.least_processes if asked is None else asked
    whose = "" if overrides else "the run's "
    problems = [f"{whose}{given}: {why}; {WAY_ON}" for given, why in one_by_one_problems(config)]
    problems = problems or list(grid_problems(config, count))
    if config.parallel.expert_dispatcher == "deepep":
        problems.append("parallel.expert_dispatcher is deepep: text is made with exact")
    if not problems and count > config.parallel.least_processes == 1:
        whose = "named" if overrides else "the run's own"
        problems.append(
            f"the number of processes (WORLD_SIZE or --nproc) is {count}, but each would hold the "
            f"whole model: the grid, {whose}, is one process; {WAY_ON}"
        )
    if problems:
        raise ConfigError(problems)
    return config, count
