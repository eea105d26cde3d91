"""Which rank writes which of the tensors that several hold."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from attnres_train.checkpoint.peers import Peers
from attnres_train.checkpoint.tensor_file import TensorSpec


def share_of(specs: Mapping[str, TensorSpec], peers: Peers) -> list[str]:
    """The names out of ``specs``, this rank's tensors, that it writes. Collective.

    Ranks that hold the same tensors (data-parallel replicas) have an even share of the bytes each,
    whole tensors. What differing sets have in common is written by each of them: to find it all
    names would have to travel, and it is the number of updates alone.
    """
    text = repr(sorted((name, entry.shape, entry.dtype) for name, entry in specs.items()))
    mine = hashlib.blake2b(text.encode(), digest_size=16).digest()
    digests: list[bytes] = peers.decide(mine, list)
    alike = [rank for rank, digest in enumerate(digests) if digest == mine]
    return _even_shares(specs, len(alike))[alike.index(peers.rank)]


def _even_shares(specs: Mapping[str, TensorSpec], count: int) -> list[list[str]]:
    """Names in ``count`` shares of about the same number of bytes; in each in the order given."""
    owner, filled = {}, [0] * count
    for name in sorted(specs, key=lambda name: (-specs[name].nbytes, name)):
        owner[name] = share = filled.index(min(filled))
        filled[share] += specs[name].nbytes
    return [[name for name in specs if owner[name] == share] for share in range(count)]
