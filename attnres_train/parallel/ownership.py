"""Which replica owns which parameter: it alone keeps the optimizer's state, and makes the update.

Whole matrices have an owner, never parts of one: Newton-Schulz, which orthogonalises a matrix,
never has to gather it from replicas. A stack of experts is as many matrices, each with an owner.
Where an update is elementwise every row may have one: tables are cut. Pure Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WORTH_CUTTING = 16
"""What has no work and less state than this part of a share has one owner: each further piece is
another message."""


@dataclass(frozen=True)
class Update:
    """What the update of a parameter costs."""

    parts: int
    """Alike, along its first axis, that may have different owners: the experts of a stack, the rows
    of what is updated element by element, 1 of anything else."""
    work: float
    """Of all of them, in FLOPs that count beside the reading and writing of memory; 0: none do."""
    state_bytes: int
    """That the optimizer keeps for it, masters included."""


@dataclass(frozen=True)
class Share:
    """Parts ``first .. stop - 1`` of parameter ``name``, and the replica that owns them."""

    name: str
    owner: int
    first: int
    stop: int
    of: int
    """How many parts there are."""

    @property
    def is_whole(self) -> bool:
        return self.stop - self.first == self.of


def share_out(updates: Sequence[tuple[str, Update]], replicas: int) -> list[Share]:
    """An owner among ``replicas`` for every part of every (name, cost), in their order; those of
    one owner in a parameter lie together.

    What has work goes first, evenly: the largest first, each to the replica with the least so far.
    Then the state of the rest fills up what that left uneven: what is small whole, where least is;
    tables at last, cut so that all come to the same level. So shares of work differ by one matrix
    at most, and of state by one row, unless what must be whole is larger than that. A function of
    the arguments alone: every replica comes to the same result.
    """
    loads = [_Load(replica) for replica in range(replicas)]
    worth = sum(update.state_bytes for _, update in updates) / (replicas * WORTH_CUTTING)
    shares: dict[str, list[Share]] = {}
    for name, update in sorted(updates, key=lambda named: _turn(named[1], worth)):
        if update.work:
            counts = _evenly(update, loads)
        elif _is_cut(update, worth):
            counts = _level(update, loads)
        else:
            counts = {min(loads, key=_Load.by_state).replica: update.parts}
        shares[name] = list(_runs(name, update.parts, counts))
        for load in loads:
            load.add(update, counts.get(load.replica, 0))
    return [share for name, _ in updates for share in shares[name]]


def most_state_bytes(updates: Sequence[Update], replicas: int) -> int:
    """The bytes of state that the replica with most of them keeps."""
    return max(state_bytes([(str(i), update) for i, update in enumerate(updates)], replicas))


def state_bytes(updates: Iterable[tuple[str, Update]], replicas: int) -> list[int]:
    """The bytes of state that each of ``replicas`` keeps."""
    updates, held = list(updates), [0] * replicas
    costs = dict(updates)
    for share in share_out(updates, replicas):
        part = costs[share.name].state_bytes // share.of
        held[share.owner] += part * (share.stop - share.first)
    return held


def _is_cut(update: Update, worth: float) -> bool:
    return not update.work and update.parts > 1 and update.state_bytes > worth


def _turn(update: Update, worth: float) -> tuple[bool, bool, bool, float, float]:
    """Sorts updates: what has work before what has none, stacks first, then the largest first; what
    has none and is cut last."""
    is_single = not update.work or update.parts == 1
    return not update.work, _is_cut(update, worth), is_single, -update.work, -update.state_bytes


@dataclass
class _Load:
    replica: int
    work: float = 0.0
    state: int = 0

    def by_work(self) -> tuple[float, int, int]:
        return self.work, self.state, self.replica

    def by_state(self) -> tuple[int, float, int]:
        return self.state, self.work, self.replica

    def add(self, update: Update, parts: int) -> None:
        self.work += update.work * parts / update.parts
        self.state += update.state_bytes // update.parts * parts


def _evenly(update: Update, loads: list[_Load]) -> dict[int, int]:
    """The same number of parts for each replica; the least loaded get those that are left over."""
    each, left = divmod(update.parts, len(loads))
    counts = {load.replica: each for load in loads}
    for load in sorted(loads, key=_Load.by_work)[:left]:
        counts[load.replica] += 1
    return counts


def _level(update: Update, loads: list[_Load]) -> dict[int, int]:
    """Parts for each replica that fill up the lowest loads of state to one level."""
    part, lowest = update.state_bytes // update.parts, sorted(loads, key=_Load.by_state)
    # Without those that lie above the level already.
    while len(lowest) > 1 and _total(lowest) + update.state_bytes < len(lowest) * lowest[-1].state:
        lowest.pop()
    level, each = _total(lowest) + update.state_bytes, len(lowest)  # of all together
    counts = dict.fromkeys((load.replica for load in loads), 0)
    for load in lowest:
        counts[load.replica] = (level - each * load.state) // (each * part)
    lowest.sort(key=lambda load: (load.state + counts[load.replica] * part, load.replica))
    for load in lowest[: update.parts - sum(counts.values())]:
        counts[load.replica] += 1
    return counts


def _total(loads: Iterable[_Load]) -> int:
    return sum(load.state for load in loads)


def _runs(name: str, parts: int, counts: dict[int, int]) -> Iterable[Share]:
    first = 0
    for owner, count in sorted(counts.items()):
        if count:
            yield Share(name, owner, first, first + count, parts)
            first += count
