"""Devices that a plan can be made for, and what they are assumed to attain.

Peaks are the makers'; what is attained of them is assumed, never measured by this project unless a
comment says so, and can be overridden (`attnres-train plan --assume`).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from attnres_train.config.tree import read_tree
from attnres_train.errors import UserError


@dataclass(frozen=True)
class Device:
    """A device, its links, and the shares of their peaks that a run attains."""

    name: str
    memory: float
    """Bytes."""
    peak_flops: float
    """FLOP/s of dense bf16 matrix products: what MFU is measured against."""
    memory_bandwidth: float
    """Bytes/s."""
    node_size: int
    """Devices of a node, which `node_link` connects."""
    node_link: float
    """Bytes/s that a device can send to those of its node."""
    network_link: float
    """Bytes/s that a device can send to other nodes."""

    matmul: float = 0.6
    """Of the peak, in projections, dense and shared MLPs and the head. Vendors' libraries reach 0.6
    to 0.75 on an H100 with large square matrices; a model's are thinner."""
    experts: float = 0.4
    """Of the peak, in grouped products of routed experts: some hundred rows each."""
    attention: float = 0.35
    """Of the peak, in softmax attention: FlashAttention-2 on an H100 (arXiv 2407.08608)."""
    recurrence: float = 0.1
    """Of the peak, in KDA's chunked recurrence: small products, and triangular solves."""
    newton_schulz: float = 0.5
    """Of the peak, in Muon's iteration: batches of square products."""
    memory_share: float = 0.75
    """Of the memory's bandwidth, in all that is bound by it. A copy was seen to reach 0.9 of it on
    an H100 and on an H200."""
    node_share: float = 0.75
    """Of `node_link`, in collectives."""
    network_share: float = 0.8
    """Of `network_link`, in collectives and pipeline hops."""
    overlap: float = 0.7
    """Of a pass that gradients or parameters can travel beside, the share in which they do."""
    expert_load: float = 1.1
    """Rows of the fullest rank's experts over the mean."""
    launch_seconds: float = 5e-6
    """Host's time per kernel: a pass takes as long as its launches at least."""
    memory_use: float = 0.9
    """Of the memory, the share that a plan may fill: the rest is for context, communicators, what
    the allocator cannot use, and what estimates are wrong by."""

    @property
    def usable_memory(self) -> float:
        return self.memory * self.memory_use


_TERA, _GIGA = 1e12, 1e9
# Sources: the makers' data sheets (H100 and H200 SXM, A100 80 GB SXM, DGX B200). Links are half of
# NVLink's figure, for one direction, and a port of 200 or 400 Gbit/s per device as in DGX systems.
DEVICES = {
    device.name: device
    for device in (
        Device("a100", 80 * _GIGA, 312 * _TERA, 2.04 * _TERA, 8, 300 * _GIGA, 25 * _GIGA),
        Device("h100", 80 * _GIGA, 989 * _TERA, 3.35 * _TERA, 8, 450 * _GIGA, 50 * _GIGA),
        Device("h200", 141 * _GIGA, 989 * _TERA, 4.8 * _TERA, 8, 450 * _GIGA, 50 * _GIGA),
        Device("b200", 180 * _GIGA, 2250 * _TERA, 8 * _TERA, 8, 900 * _GIGA, 50 * _GIGA),
        # A core of a common server with its share of the memory, gloo between processes: assumed.
        Device(
            "cpu",
            4 * _GIGA,
            0.05 * _TERA,
            10 * _GIGA,
            8,
            1 * _GIGA,
            0.1 * _GIGA,
        ),
    )
}
_SHARES = (
    "matmul",
    "experts",
    "attention",
    "recurrence",
    "newton_schulz",
    "memory_share",
    "node_share",
    "network_share",
    "overlap",
    "memory_use",
)
"""Keys whose values are shares of 1."""


def find_device(name: str, assumed: Iterable[str] = ()) -> Device:
    """The device ``name`` with what ``assumed`` says instead: ``KEY=VALUE``, or a YAML file of such
    keys, in order. Raises UserError for what is not known or cannot be."""
    if name not in DEVICES:
        raise UserError(f"--device {name} is not known: take one of {', '.join(sorted(DEVICES))}")
    device = DEVICES[name]
    for word in assumed:
        device = replace(device, **_values(word))  # type: ignore[arg-type]  # by `_value`
    return device


def _values(word: str) -> dict[str, float]:
    key, sign, value = word.partition("=")
    given = {key: value} if sign else read_tree(Path(word)).values
    return {key: _value(key, value) for key, value in given.items()}


def _value(key: str, value: Any) -> float:
    known = [field.name for field in fields(Device) if field.name != "name"]
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        meant = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise UserError(f"--assume {key}: nothing is called so; {meant}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"--assume {key}={value}: expected a number") from None
    most = 1.0 if key in _SHARES else math.inf
    if not 0 < number <= most or math.isinf(number):
        limit = "above 0 and at most 1" if key in _SHARES else "finite and above 0"
        raise UserError(f"--assume {key}={value}: it must be {limit}")
    if key == "node_size":
        if number % 1:
            raise UserError(f"--assume {key}={value}: expected a whole number")
        return int(number)
    return number
