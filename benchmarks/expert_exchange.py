"""Bytes and time of one MoE layer whose experts are shared by ranks, side by side in one run.

Contestants send the same tokens through the same layer: *exact*, the exchange as it is (a token
once to every rank that has an expert of it); *per expert*, an all-to-all that sends a token once
for each of its experts; *bounded*, that with room for a fixed number (`--room` times an even
load's), which reads nothing on the host. *least* is counted from the routing: a token must get to
every other rank with an expert of it and that rank's sum back, and gradients the same ways.
*padded*, as an exchange of the fullest rank's size would be, and *gathered*, all tokens everywhere,
are counted too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from attnres_train.config.model_schema import MoEConfig
from attnres_train.model.moe.layer import MixtureOfExperts
from attnres_train.model.ports import Routed, Sent, TokenExchange
from attnres_train.parallel.bounded import BoundedExchange
from attnres_train.parallel.experts import ExpertExchange


class PerExpert(ExpertExchange):
    """Every (token, expert) pair travels by itself."""

    def send(self, tokens: Tensor, experts: Tensor, weights: Tensor, dtype: torch.dtype) -> Sent:
        chosen = experts.shape[1]
        repeated = tokens.repeat_interleave(chosen, 0)
        sent = super().send(repeated, experts.view(-1, 1), weights.view(-1, 1), dtype)
        return _Pairs(sent, chosen)


class _Pairs:
    def __init__(self, sent: Sent, chosen: int) -> None:
        self.sent, self.chosen = sent, chosen
        self.load = sent.load

    def arrived(self) -> Routed:
        return self.sent.arrived()

    def back(self, sums: Tensor) -> Tensor:
        rows = self.sent.back(sums)
        return rows.view(-1, self.chosen, rows.shape[-1]).sum(1)


def make_exchanges(args: argparse.Namespace) -> dict[str, ExpertExchange]:
    group, config = dist.group.WORLD, moe_config(args)
    return {
        "exact": ExpertExchange(args.experts, group),
        "per expert": PerExpert(args.experts, group),
        "bounded": BoundedExchange(config, group, args.room),
    }


def moe_config(args: argparse.Namespace) -> MoEConfig:
    return MoEConfig(
        num_experts=args.experts, num_experts_per_token=args.chosen, intermediate_size=args.width
    )


def make_layer(args: argparse.Namespace, exchange: TokenExchange) -> MixtureOfExperts:
    """The same router and shared expert on every rank, and a rank's own experts."""
    moe = MixtureOfExperts(args.hidden, moe_config(args), exchange)
    torch.manual_seed(0)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    # Uneven by this much: scores are sigmoids of numbers around 0.
    bias = torch.linspace(-args.skew / 2, args.skew / 2, args.experts)
    moe.gate.e_score_correction_bias.copy_(bias[torch.randperm(args.experts)])
    return moe


def counted(moe: MixtureOfExperts, x: Tensor, ranks: int, rank: int) -> dict[str, Tensor]:
    """Tokens that this rank sends to others in one direction, by contestant, one number each."""
    with torch.no_grad():
        owner = moe.gate(x)[1] // (moe.gate.config.num_experts // ranks)
    there = torch.stack([(owner == other).any(1) for other in range(ranks)], 1)
    to_others = torch.arange(ranks) != rank
    largest = there.sum(0).max()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return {
        "least": there[:, to_others].sum(),
        "padded": largest * (ranks - 1),
        "gathered": torch.tensor(len(x) * (ranks - 1)),
    }


def measure(rank: int, store: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    files = dist.FileStore(store, args.ranks)
    dist.init_process_group("gloo", store=files, rank=rank, world_size=args.ranks)
    torch.manual_seed(rank + 1)
    x = torch.randn(args.tokens, args.hidden)
    exchanges = make_exchanges(args)
    layers = {name: make_layer(args, exchange) for name, exchange in exchanges.items()}
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    outputs: dict[str, Tensor] = {}
    for _ in range(args.rounds + 1):
        for name, moe in layers.items():
            dist.barrier()
            started = time.perf_counter()
            outputs[name] = moe(x.requires_grad_())[0]
            outputs[name].square().sum().backward()
            dist.barrier()
            seconds[name].append(time.perf_counter() - started)
    first, *others = outputs.values()
    assert all(torch.allclose(first, other, rtol=1e-4, atol=1e-6) for other in others)

    units = counted(layers["exact"], x, args.ranks, rank)
    token_bytes = 4 * args.hidden * x.element_size()  # there and back, forward and backward
    sent = {name: torch.tensor(e.bytes_sent / (args.rounds + 1)) for name, e in exchanges.items()}
    sent |= {name: number * float(token_bytes) for name, number in units.items()}
    for total in sent.values():
        dist.all_reduce(total)
    if rank == 0:
        tokens = args.ranks * args.tokens
        for name in ("least", "exact", "bounded", "per expert", "padded", "gathered"):
            took = seconds.get(name, [])[1:]
            shown = f"{1000 * statistics.median(took):.0f} ms" if took else "-"
            ratio = float(sent[name] / sent["least"])
            print(f"| {name} | {float(sent[name]) / tokens:,.0f} | {ratio:.3f} | {shown} |")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=8, help="processes (%(default)s)")
    parser.add_argument("--experts", type=int, default=256, help="of the layer (%(default)s)")
    parser.add_argument("--chosen", type=int, default=8, help="per token (%(default)s)")
    parser.add_argument("--hidden", type=int, default=2304, help="hidden size (%(default)s)")
    parser.add_argument("--width", type=int, default=32, help="of an expert (%(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="per rank (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="that are timed (%(default)s)")
    parser.add_argument("--skew", type=float, default=0.0, help="of the router's biases")
    parser.add_argument("--room", type=float, default=2.0, help="of the bounded one (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    args = parser.parse_args()
    if args.quick:
        args.ranks, args.experts, args.hidden, args.tokens, args.rounds = 2, 16, 16, 16, 1
        args.room = 16.0
    print(
        f"{args.experts} experts, {args.chosen} per token, {args.ranks} ranks, skew {args.skew:g}"
    )
    print("| exchange | bytes per token | over least | layer |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (str(Path(folder) / "store"), args), nprocs=args.ranks)


if __name__ == "__main__":
    main()
