"""Which rank writes which of the tensors that several hold."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from attnres_train.checkpoint.names import OPTIMIZER
from attnres_train.checkpoint.peers import Peers
from attnres_train.checkpoint.saved import assembled
from attnres_train.checkpoint.tensor_file import TensorSpec
from attnres_train.model.parts import is_part

Kind = tuple[bool, bool, bool]


def share_of(specs: Mapping[str, TensorSpec], peers: Peers) -> list[str]:
    """The names out of ``specs``, this rank's tensors, that it writes. Collective.

    Ranks that hold the same tensors of a kind (`_kind`; data-parallel replicas) have an even share
    of the bytes each, undivided. What differing sets of a kind have in common is written by
    each of them: to find it all names would have to travel, and it is the number of updates alone.

    Raises ValueError, on every rank, where parts that are written do not make up whole tensors.
    """
    by_kind: dict[Kind, dict[str, TensorSpec]] = {}
    for name, entry in specs.items():
        by_kind.setdefault(_kind(name), {})[name] = entry
    mine = {kind: _digest(own) for kind, own in by_kind.items()}
    everybody: list[dict[Kind, bytes]] = peers.decide(mine, list)
    chosen: set[str] = set()
    for kind, own in by_kind.items():
        alike = [rank for rank, digests in enumerate(everybody) if digests.get(kind) == mine[kind]]
        chosen.update(_even_shares(own, len(alike))[alike.index(peers.rank)])
    peers.decide([(name, specs[name]) for name in specs if is_part(name)], _check_parts)
    return [name for name in specs if name in chosen]


def _check_parts(by_rank: Sequence[Sequence[tuple[str, TensorSpec]]]) -> None:
    # A tensor that is not all there would be missed when it is loaded, and the step be gone.
    assembled(part for parts in by_rank for part in parts)


def _kind(name: str) -> Kind:
    """Replicas of experts, and of parts of what tensor ranks share, are on fewer ranks than those
    of the rest, and of the optimizer's state each has what it owns."""
    return name.startswith(OPTIMIZER), ".experts." in name, is_part(name)


def _digest(specs: Mapping[str, TensorSpec]) -> bytes:
    text = repr(sorted((name, entry.shape, entry.dtype) for name, entry in specs.items()))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _even_shares(specs: Mapping[str, TensorSpec], count: int) -> list[list[str]]:
    """Names in ``count`` shares of about the same number of bytes; in each in the order given."""
    owner, filled = {}, [0] * count
    for name in sorted(specs, key=lambda name: (-specs[name].nbytes, name)):
        owner[name] = share = filled.index(min(filled))
        filled[share] += specs[name].nbytes
    return [[name for name in specs if owner[name] == share] for share in range(count)]
