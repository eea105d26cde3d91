"""Which replica owns which parameter: it alone keeps the optimizer's state, and makes the update.

Whole matrices have an owner, never parts of one: Newton-Schulz, which orthogonalises a matrix,
never has to gather it. A stack of experts is as many matrices, each with an owner. Pure Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Update:
    """What the update of a parameter costs."""

    matrices: int
    """That may have different owners: the experts of a stack, 1 of anything else."""
    work: float
    """Of all of them, in FLOPs that count beside the reading and writing of memory; 0: none do."""
    state_bytes: int
    """That the optimizer keeps for it, masters included."""


@dataclass(frozen=True)
class Share:
    """Matrices ``first .. stop - 1`` of parameter ``name``, and the replica that owns them."""

    name: str
    owner: int
    first: int
    stop: int
    of: int
    """How many matrices there are."""

    @property
    def is_whole(self) -> bool:
        return self.stop - self.first == self.of


def share_out(updates: Sequence[tuple[str, Update]], replicas: int) -> list[Share]:
    """An owner among ``replicas`` for every matrix of every (name, cost), in their order; those of
    one owner in a stack lie together.

    The largest first, each to the replica with the least so far: of work for what has any, then of
    state for the rest, which fills up what the former left uneven. So the shares differ by one
    matrix at most, but for one tensor that is larger than a whole share. A function of the
    arguments alone: every replica comes to the same result.
    """
    loads = [_Load(replica) for replica in range(replicas)]
    shares: dict[str, list[Share]] = {}
    for name, update in sorted(updates, key=lambda named: _turn(named[1])):
        # The least loaded get the experts that are left over when all have got the same number.
        order = sorted(loads, key=_Load.by_work if update.work else _Load.by_state)
        each, left = divmod(update.matrices, replicas)
        counts = {load.replica: each for load in loads}
        for load in order[:left]:
            counts[load.replica] += 1
        shares[name] = list(_runs(name, update.matrices, counts))
        for load in loads:
            load.add(update, counts[load.replica])
    return [share for name, _ in updates for share in shares[name]]


def most_state_bytes(updates: Sequence[Update], replicas: int) -> int:
    """The bytes of state that the replica with most of them keeps."""
    return max(state_bytes([(str(i), update) for i, update in enumerate(updates)], replicas))


def state_bytes(updates: Iterable[tuple[str, Update]], replicas: int) -> list[int]:
    """The bytes of state that each of ``replicas`` keeps."""
    updates, held = list(updates), [0] * replicas
    costs = dict(updates)
    for share in share_out(updates, replicas):
        matrix = costs[share.name].state_bytes // share.of
        held[share.owner] += matrix * (share.stop - share.first)
    return held


def _turn(update: Update) -> tuple[bool, bool, float, float]:
    """Sorts updates: what has work before what has none, stacks first, then the largest first."""
    return not update.work, update.matrices == 1, -update.work, -update.state_bytes


@dataclass
class _Load:
    replica: int
    work: float = 0.0
    state: float = 0.0

    def by_work(self) -> tuple[float, float, int]:
        return self.work, self.state, self.replica

    def by_state(self) -> tuple[float, float, int]:
        return self.state, self.work, self.replica

    def add(self, update: Update, matrices: int) -> None:
        self.work += update.work * matrices / update.matrices
        self.state += update.state_bytes * matrices / update.matrices


def _runs(name: str, matrices: int, counts: dict[int, int]) -> Iterable[Share]:
    first = 0
    for owner, count in counts.items():
        if count:
            yield Share(name, owner, first, first + count, matrices)
            first += count
