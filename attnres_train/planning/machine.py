"""The machine that a plan is made for, and the options of `attnres-train plan`. Apart from
`planning.planner`, so that `--help` loads no torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from attnres_train.pipeline.plan.parts import MODES


@dataclass(frozen=True)
class Machine:
    """What passes and transfers are timed with."""

    flops_rate: float = 4e14
    """FLOP/s that a rank attains in its passes."""
    peak_flops: float = 989e12
    """FLOP/s that MFU is measured against: an H100's in dense bf16."""
    link_bandwidth: float = 5e10
    """Bytes/s that a rank can send."""


SEARCH_OPTIONS = ("device", "assume", "yaml")
"""Those of a search, which `--gpus` asks for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command, besides config and overrides."""
    default = Machine()
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--picture", metavar="FILE", help="draw the simulated step: FILE.svg, or FILE.png"
    )
    parser.add_argument(
        "--window",
        metavar="A:B",
        help="of the picture: the times shown, e.g. 0:40ms or 45%%:55%% (default: all, or of a "
        "long step its beginning, some of its middle and its end)",
    )
    parser.add_argument(
        "--mode", choices=MODES, default="eager", help="transport in the picture (%(default)s)"
    )
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="processes of the run (default: one replica)"
    )
    parser.add_argument(
        "--flops-rate",
        type=float,
        default=default.flops_rate,
        metavar="FLOP/S",
        help="speed of a rank within its passes (%(default)g)",
    )
    parser.add_argument(
        "--peak-flops",
        type=float,
        default=default.peak_flops,
        metavar="FLOP/S",
        help="peak of the device, for MFU (%(default)g)",
    )
    parser.add_argument(
        "--link-bandwidth",
        type=float,
        default=default.link_bandwidth,
        metavar="BYTES/S",
        help="what a rank can send (%(default)g)",
    )
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="search the best grid, layout, recomputation and micro-batch for N devices",
    )
    parser.add_argument(
        "--device", metavar="NAME", help="of the search: a100, b200, cpu, h100 (default) or h200"
    )
    parser.add_argument(
        "--assume",
        action="append",
        metavar="KEY=VALUE|FILE",
        help="of the search: what a device attains, e.g. matmul=0.5, or a YAML file of such keys",
    )
    parser.add_argument(
        "--yaml", metavar="FILE", help="of the search: write the best, a config that extends CONFIG"
    )
