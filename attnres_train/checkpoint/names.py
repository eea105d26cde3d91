"""Names of what is saved. They hold global layer and expert indices and nothing of the layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from torch import Tensor

from attnres_train.model.parts import tensor_of

Named = Iterable[tuple[str, Tensor]]
OPTIMIZER = "optimizer."
MASTER = f"{OPTIMIZER}master."


def parameter_of(name: str) -> str:
    """The released name of the parameter or buffer that a saved tensor, or part of one, ``name``
    is, or is the state of; that of the number of updates is empty."""
    name = tensor_of(name)
    return name.removeprefix(OPTIMIZER).partition(".")[2] if name.startswith(OPTIMIZER) else name


class SavedOptimizer(Protocol):
    """What this module reads of an optimizer: its live state tensors and its number of updates."""

    steps: Tensor

    def state_tensors(self) -> Iterator[tuple[str, str, Tensor]]: ...


def training_state(
    named_tensors: Named,
    optimizer: SavedOptimizer | None,
    released_tensors: Callable[[Named], Named],
) -> dict[str, Tensor]:
    """Everything of this rank to be saved or loaded in place, under layout-free names.

    ``named_tensors`` are the parameters and persistent buffers of the rank's chunks under chunk
    names. ``released_tensors`` maps (chunk name, tensor) pairs to (released name, view) pairs: one
    view each, one per expert for a stack, parts named as such (`model.naming.released_tensors`).
    Optimizer state becomes ``optimizer.<state key>.<released name>``, the number of updates
    ``optimizer.steps``; without an optimizer only the model's tensors are named. Raises ValueError
    for a name that comes twice.
    """
    pairs = list(released_tensors((name, tensor.detach()) for name, tensor in named_tensors))
    if optimizer is not None:
        for name, key, tensor in optimizer.state_tensors():
            views = released_tensors([(name, tensor.detach())])
            pairs += [(f"{OPTIMIZER}{key}.{released}", view) for released, view in views]
        pairs.append((f"{OPTIMIZER}steps", optimizer.steps))
    state = dict(pairs)
    if len(state) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"more than one tensor named {', '.join(twice)}")
    return state
