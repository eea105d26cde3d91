"""What a rank has of a run's state, under names that know nothing of the layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from torch import Tensor
from torch.distributed import ProcessGroup

from attnres_train.checkpoint.names import OPTIMIZER, SavedOptimizer, parameter_of, training_state
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.naming import released_tensors
from attnres_train.model.parameters import parameter_rules
from attnres_train.parallel.ranks import Ranks, places_of


def named_state(
    chunks: Sequence[ModelChunk], optimizer: SavedOptimizer, ranks: Ranks
) -> dict[str, Tensor]:
    """All of this rank to be saved, and loaded in place: parameters, buffers, optimizer state
    (`checkpoint.names`), parts of tensors named as such (`model.parts`)."""
    named = [item for chunk in chunks for item in chunk.state_dict(keep_vars=True).items()]
    first_expert = next((c.ports.exchange.experts.start for c in chunks), 0)
    places = {name: place for chunk in chunks for name, place in places_of(chunk, ranks)}
    released = partial(released_tensors, first_expert=first_expert, places=places)
    return training_state([(name, tensor.detach()) for name, tensor in named], optimizer, released)


def by_holders(
    tensors: dict[str, Tensor], chunks: Iterable[ModelChunk], ranks: Ranks, sharded: bool
) -> dict[ProcessGroup, dict[str, Tensor]]:
    """``tensors``, of `named_state`, by who holds the same; but the optimizer's state where that is
    ``sharded``: its owner alone holds it."""
    rules = {
        released: rule
        for chunk in chunks
        for name, rule in parameter_rules(chunk).items()
        for released in _released(chunk, name)
    }
    found: dict[ProcessGroup, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if sharded and name.startswith(OPTIMIZER):
            continue
        rule = rules.get(parameter_of(name))  # none: a buffer
        group = ranks.stage if rule is None else ranks.replicas(rule)
        found.setdefault(group, {})[name] = tensor
    return found


def _released(chunk: ModelChunk, name: str) -> Iterator[str]:
    first = chunk.ports.exchange.experts.start
    for released, _ in released_tensors([(name, chunk.get_parameter(name))], first):
        yield released
