"""Step time of two replicas on a link of limited bandwidth: gradients and parameters that travel
beside the passes, next to those that travel between them.

    python benchmarks/reduction_overlap.py

Every replica is a gloo process in a network namespace of its own (Linux, root and iproute2). A
small model with KDA, MLA and experts computes in earnest and sleeps for what is left of its time,
as if an accelerator did it (`paced`). *alone* sends nothing; *after* begins to send gradients when
the backward pass is over, and goes on when all parameters are there; *beside* is what a run does.
*simulated* has every gradient ready at the end of its layer, a message for each layer, and an
update that takes no time. `--links`: the time to send all gradients over that of a backward pass.

A round times each contestant once, over some steps; the table has medians over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

import small_model
from attnres_train.config.schema import OptimizerConfig
from attnres_train.model.parameters import parameter_rules
from attnres_train.optim.build import build_optimizer
from attnres_train.optim.kinds import optimizer_kind
from attnres_train.parallel.gathering import ParameterGather
from attnres_train.parallel.owned import OwnedOptimizer
from attnres_train.parallel.pieces import Held, Piece, make_pieces
from attnres_train.parallel.reduction import GradientReduction
from attnres_train.pipeline.plan.messages import channels
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from attnres_train.pipeline.run.engine import Engine
from attnres_train.pipeline.run.transport import P2PTransport
from attnres_train.planning.updates import update_of
from cluster import Cluster, Job, stop_on_signals
from paced import Pace
from ring import what_is_missing

CONTESTANTS = ("alone", "after", "beside")
REPLICAS, STEPS = 2, 3


class Replica:
    """One rank: a whole model, AdamW for all of it, shared out."""

    def __init__(self, rank: int, seconds: float) -> None:
        torch.manual_seed(rank)
        layout = small_model.layout(1, 1, small_model.BLOCK_SIZE)
        plan = TransportPlan(layout)
        self.chunk = small_model.make_model(layout, 0)
        self.pieces = pieces_of(self.chunk)
        own = [(piece.name, piece.tensor) for piece in self.pieces if piece.is_mine]
        config = OptimizerConfig(kind="adamw")
        optimizer = build_optimizer(own, parameter_rules(self.chunk), config, "cpu")
        reader = self.chunk.first_reader
        gather = ParameterGather(
            {0: self.chunk}, self.pieces, lambda piece: reader(piece.parameter_name)
        )
        Pace(self.chunk, seconds)  # after the gather, for which layers wait
        late = self.chunk.read_rules()
        reduction = GradientReduction(self.pieces, REPLICAS, late=late)
        self.update = OwnedOptimizer(optimizer, reduction, gather)
        transport = P2PTransport(
            channels(plan), [[r] for r in range(REPLICAS)], timedelta(minutes=2)
        )
        self.engine = Engine(
            {0: self.chunk}, plan, 0, transport, small_model.HIDDEN_SIZE, torch.float32
        )

    def time_steps(self, name: str) -> tuple[float, float]:
        """When some steps of a contestant began and ended on this rank."""
        batches = [small_model.make_batch()]
        dist.barrier()
        started = time.monotonic()
        for _ in range(STEPS):
            getattr(self, f"_{name}")(batches)
            self.update.zero_grad()
        self.update.wait()
        return started, time.monotonic()

    def _alone(self, batches: Sequence) -> None:
        self.engine.train_step(batches)
        for piece in self.pieces:  # what its owner updates
            piece.tensor.grad = piece.of(piece.parameter.grad)
        self.update.optimizer.step(0.0)

    def _after(self, batches: Sequence) -> None:
        self.engine.train_step(batches)
        self.update.reduction.finish()
        self.update.step(0.0)
        self.update.wait()

    def _beside(self, batches: Sequence) -> None:
        self.engine.train_step(batches, self.update.reduction.last_backward)
        self.update.reduction.finish()
        self.update.step(0.0)


def pieces_of(chunk: torch.nn.Module) -> list[Piece]:
    rules, kind = parameter_rules(chunk), optimizer_kind(OptimizerConfig(kind="adamw"))
    named = list(chunk.named_parameters())
    costs = {n: update_of(kind, n, tuple(p.shape), rules[n], False) for n, p in named}
    return make_pieces([Held(0, n, p, dist.group.WORLD) for n, p in named], costs, sharded=True)


@dataclass(frozen=True)
class Paced:
    """Makes the job of a worker."""

    seconds: float

    def __call__(self, rank: int, ranks: int) -> Job:
        return Replica(rank, self.seconds).time_steps


def simulated(seconds: float, link: float) -> dict[str, float]:
    """Seconds of a step of *after* and of *beside*: a forward pass takes ``seconds``, a backward
    pass two times that, and gradients ``link`` times the latter on the link; layers are alike.

    The link has two directions, but gloo one connection for both, on which operations take turns: a
    rank's word that it is ready to receive waits behind what it sends. A broadcast takes the time
    of its bytes, and so does a reduction, of which one half goes both ways at once, then the other
    to the owner."""
    layers = small_model.LAYERS
    of_layer = link * 2 * seconds / layers
    clock = free = 0.0
    for _ in range(layers):  # backward: a layer's gradients leave when it is done
        clock += 2 * seconds / layers
        free = max(free, clock) + of_layer
    clock = free  # the update is for free
    for layer in range(layers):  # the next forward pass: a layer waits for its parameters
        clock = max(clock, free + (layer + 1) * of_layer) + seconds / layers
    return {"after": 3 * seconds + 2 * layers * of_layer, "beside": clock}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--milliseconds", type=float, default=500, help="of a forward pass")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--links", type=float, nargs="+", default=[0.25, 0.5, 1, 2])
    parser.add_argument("--quick", action="store_true", help="a smoke run; figures mean nothing")
    args = parser.parse_args()
    if args.quick:
        args.milliseconds, args.rounds, args.links = 5, 1, [0.5]
    if missing := what_is_missing():
        print(f"reduction_overlap needs {missing}")
        sys.exit(0 if args.quick else 2)
    stop_on_signals()
    seconds = args.milliseconds / 1e3
    layout = small_model.layout(1, 1, small_model.BLOCK_SIZE)
    numbers = sum(p.numel() for p in small_model.make_model(layout, 0).parameters())
    print(f"{numbers:,} parameters, {REPLICAS} replicas, forward pass {args.milliseconds:g} ms")
    print("| link / backward | alone, ms | after | simulated | beside | simulated | hidden |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with Cluster(REPLICAS, Paced(seconds)) as cluster:
        for name in CONTESTANTS:
            cluster.run(name)  # opens connections
        for link in args.links:
            cluster.ring.shape(4 * numbers / (link * 2 * seconds))
            rounds = [{n: cluster.run(n) / STEPS for n in CONTESTANTS} for _ in range(args.rounds)]
            took = {n: statistics.median(one[n] for one in rounds) for n in CONTESTANTS}
            alone, expected = took["alone"], simulated(seconds, link)
            more = {n: took[n] / alone - 1 for n in ("after", "beside")}
            cells = [f"{more[n]:+.1%} | {expected[n] / (3 * seconds) - 1:+.1%}" for n in more]
            hidden = 1 - more["beside"] / more["after"]
            print(
                f"| {link:g} | {1000 * alone:.0f} | {' | '.join(cells)} | {hidden:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
