"""The optimizer shared out over replicas, next to every replica doing all and to torch's
ZeroRedundancyOptimizer: memory of a rank, time and bytes of a step.

    python benchmarks/sharded_optimizer.py

Of a step that is everything after the backward pass: gradients to whoever needs them, the update,
new parameters to all. A mixture of experts of 5.8 M parameters in fp32, random gradients, gloo on
this machine. Every round times each contestant once, in turn; figures are medians over rounds.
Bytes are what the loopback interface carried, per rank. ``--quick`` is a smoke run.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer

from attnres_train.config.model_schema import ModelConfig
from attnres_train.config.schema import OptimizerConfig
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.init import init_weights
from attnres_train.model.parameters import parameter_rules
from attnres_train.optim.build import build_optimizer
from attnres_train.optim.kinds import optimizer_kind
from attnres_train.optim.muon import Muon
from attnres_train.parallel.gathering import ParameterGather
from attnres_train.parallel.gradients import in_buckets
from attnres_train.parallel.owned import OwnedOptimizer
from attnres_train.parallel.pieces import Held, make_pieces
from attnres_train.parallel.reduction import GradientReduction
from attnres_train.planning.updates import update_of

MODEL: dict[str, Any] = {
    "hidden_size": 192,
    "num_layers": 4,
    "vocab_size": 4096,
    "intermediate_size": 768,
    "kda": {"num_heads": 3, "head_dim": 64},
    "mla": {"num_heads": 3, "kv_lora_rank": 96, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32},
    "moe": {"num_experts": 8, "num_experts_per_token": 2, "intermediate_size": 192},
}
SMALL = {"hidden_size": 32, "num_layers": 2, "vocab_size": 64, "intermediate_size": 64}
LR = 1e-3


class Contestant(Protocol):
    def step(self) -> None:
        """From the gradients in ``.grad`` to updated parameters on every replica."""

    def state_bytes(self) -> int: ...


class Ours:
    """As a run has it; ``sharded`` False: every replica makes every update."""

    def __init__(self, chunk: ModelChunk, config: OptimizerConfig) -> None:
        named, rules = dict(chunk.named_parameters()), parameter_rules(chunk)
        kind = optimizer_kind(config)
        costs = {n: update_of(kind, n, tuple(p.shape), rules[n], False) for n, p in named.items()}
        held = [Held(0, name, p, dist.group.WORLD) for name, p in named.items()]
        pieces = make_pieces(held, costs, config.sharded)
        mine = [(piece.name, piece.tensor) for piece in pieces if piece.is_mine]
        self.optimizer = build_optimizer(mine, rules, config, "cpu")
        reduction = GradientReduction(pieces, dist.get_world_size())
        gather = ParameterGather({0: chunk}, pieces, lambda _: chunk)
        self.update = OwnedOptimizer(self.optimizer, reduction, gather)

    def step(self) -> None:
        self.update.reduction.finish()
        self.update.step(LR)
        self.update.wait()
        self.update.zero_grad()

    def state_bytes(self) -> int:
        return sum(tensor.nbytes for *_, tensor in self.optimizer.state_tensors())


class Torchs:
    """Gradients averaged in flat buckets, as DistributedDataParallel does; then torch's
    ZeroRedundancyOptimizer, which parts by whole parameters, of AdamW or of our Muon for what is
    Muon's and AdamW for the rest."""

    def __init__(self, chunk: ModelChunk, config: OptimizerConfig) -> None:
        kind, rules = optimizer_kind(config), parameter_rules(chunk)
        self.parameters = list(chunk.parameters())
        by_optimizer: dict[str, list[Tensor]] = {"muon": [], "adamw": []}
        for name, parameter in chunk.named_parameters():
            part = kind.part(name, tuple(parameter.shape), rules[name])
            by_optimizer[part.optimizer].append(parameter)
        options: dict[str, dict[str, Any]] = {
            "muon": {
                "optimizer_class": Muon,
                "ns_dtype": torch.float32,
                "max_batch_elements": 2**18,
            },
            "adamw": {"optimizer_class": torch.optim.AdamW, "betas": (0.9, 0.95)},
        }
        self.optimizers = [
            ZeroRedundancyOptimizer(
                params, lr=LR, weight_decay=0.1, parameters_as_bucket_view=False, **options[name]
            )
            for name, params in by_optimizer.items()
            if params
        ]

    def step(self) -> None:
        for bucket in in_buckets([p.grad for p in self.parameters]):
            flat = torch.cat([g.reshape(-1) for g in bucket])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def state_bytes(self) -> int:
        states = [state for o in self.optimizers for state in o.optim.state.values()]
        tensors = [t for state in states for t in state.values() if isinstance(t, Tensor)]
        return sum(tensor.nbytes for tensor in tensors if tensor.ndim)


CONTESTANTS: dict[str, tuple[Callable[..., Contestant], bool]] = {
    "every replica all": (Ours, False),
    "torch's ZeRO": (Torchs, True),
    "sharded": (Ours, True),
}


def sent_bytes() -> int:
    """Bytes that the loopback interface has carried, once each."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == "lo":
            return int(figures.split()[8])
    raise RuntimeError("no loopback interface")


def collectives(rounds: int) -> Iterator[str]:
    """Ways to bring sums to owners, and values from them: 4 MiB to each rank."""
    ranks = dist.get_world_size()
    whole, own = torch.zeros(ranks * 2**20), torch.zeros(2**20)
    shares = whole.chunk(ranks)
    ways: dict[str, Callable[[], object]] = {
        "reduce, to each owner": lambda: [
            work.wait() for work in [dist.reduce(s, r, async_op=True) for r, s in enumerate(shares)]
        ],
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(own, whole),
        "all-reduce": lambda: dist.all_reduce(whole),
        "broadcast, from each owner": lambda: [
            work.wait()
            for work in [dist.broadcast(s, r, async_op=True) for r, s in enumerate(shares)]
        ],
        "all-gather": lambda: dist.all_gather_into_tensor(whole, own),
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            dist.barrier()
            before, started = sent_bytes(), time.perf_counter()
            way()
            dist.barrier()
            spent[name].append(time.perf_counter() - started)
            if len(spent[name]) == rounds + 1:
                sent = (sent_bytes() - before) / ranks / whole.nbytes
                middle = 1000 * statistics.median(spent[name][1:])
                yield f"| {name} | {ranks} | {middle:.1f} | {sent:.2f} |"


def rank_main(rank: int, ranks: int, port: int, kind: str, rounds: int, quick: bool) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of names that 2.13 renames
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    for line in measure(kind, rounds, quick) if kind else collectives(rounds):
        if rank == 0:
            print(line, flush=True)
    dist.destroy_process_group()


def measure(kind: str, rounds: int, quick: bool) -> Iterator[str]:
    """Lines of the table for one number of replicas; collective."""
    model = ModelConfig(**{**MODEL, **(SMALL if quick else {})})
    ranks, runs = dist.get_world_size(), {}
    for name, (make, sharded) in CONTESTANTS.items():
        chunk = ModelChunk(model, 0, model.num_layers)
        init_weights(chunk, seed=0)
        runs[name] = chunk, make(chunk, OptimizerConfig(kind=kind, lr=LR, sharded=sharded))
    generator = torch.Generator().manual_seed(dist.get_rank())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    sent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, (chunk, contestant) in runs.items():
            for parameter in chunk.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            dist.barrier()
            before, started = sent_bytes(), time.perf_counter()
            contestant.step()
            dist.barrier()
            seconds[name].append(time.perf_counter() - started)
            sent[name].append((sent_bytes() - before) / ranks)
    parameters = sum(p.nbytes for p in runs["sharded"][0].parameters())
    for name, (chunk, contestant) in runs.items():
        kept = torch.zeros(ranks)
        kept[dist.get_rank()] = contestant.state_bytes()
        dist.all_reduce(kept)
        values = torch.cat([p.detach().flatten() for p in chunk.parameters()])
        first = values.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, values), f"{name}: replicas differ"
        pairs = zip(seconds[name][1:], seconds["every replica all"][1:], strict=True)
        ratios = [own / all_ for own, all_ in pairs]
        middle = statistics.median(seconds[name][1:])
        yield (
            f"| {kind} | {ranks} | {name} | {kept.max() / 1e6:.1f} ({kept.sum() / 1e6:.1f}) "
            f"| {1000 * middle:.0f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {statistics.median(sent[name][1:]) / parameters:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--port", type=int, default=29411)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    head = ["optimizer", "replicas", "who updates", "state, MB: most (all)", "step, ms"]
    head += ["to every replica all", "sent / parameters"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    port = args.port
    for kind in ("muon", "adamw", ""):
        if not kind:
            print("\n| operation | ranks | ms | sent / tensor |\n|---|---|---|---|", flush=True)
        for ranks in [2] if args.quick else args.replicas:
            port += 1
            rounds = 1 if args.quick else args.rounds
            mp.spawn(rank_main, (ranks, port, kind, rounds, args.quick), ranks)


if __name__ == "__main__":
    main()
