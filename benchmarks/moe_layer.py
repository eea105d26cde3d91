"""Time of a mixture of experts in one process, forward + backward, against other ways to write it.

    OMP_NUM_THREADS=2 python benchmarks/moe_layer.py

*ours*: tokens sorted by expert, a GEMM per expert into one output, sums without atomic adds.
*loop*: for each expert its tokens are taken out, computed and added (`index_add`), as Hugging
Face's models do. *grouped_mm*: sorted as ours, `torch.nn.functional.grouped_mm` and autograd's own
gradients, where torch has it for the device and dtype. Router, weights and shared expert are the
same; outputs and gradients are compared. Each round times every contestant once; a ratio is the
median over rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from attnres_train.config.model_schema import MoEConfig
from attnres_train.model.moe.layer import MixtureOfExperts
from attnres_train.model.moe.permutation import Permutation

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Loop(MixtureOfExperts):
    """Expert after expert."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens, e = x.flatten(0, -2), self.experts
        weights, experts = self.gate(tokens)
        y = torch.zeros_like(tokens)
        for expert in range(len(e.w1)):
            token, choice = (experts == expert).nonzero(as_tuple=True)
            rows = tokens[token]
            hidden = F.silu(F.linear(rows, e.w1[expert])) * F.linear(rows, e.w3[expert])
            out = F.linear(hidden, e.w2[expert]) * weights[token, choice, None].to(rows.dtype)
            y.index_add_(0, token, out)
        assert self.shared_experts is not None
        return y.view_as(x) + self.shared_experts(x), experts


class Grouped(MixtureOfExperts):
    """torch's grouped matmul, differentiated by torch."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens, e = x.flatten(0, -2), self.experts
        weights, experts = self.gate(tokens)
        pairs = Permutation.sort(experts, len(e.w1))
        rows, ends = tokens[pairs.token], pairs.ends
        gate = F.grouped_mm(rows, e.w1.transpose(1, 2), offs=ends)
        up = F.grouped_mm(rows, e.w3.transpose(1, 2), offs=ends)
        hidden = F.silu(gate) * up * weights.flatten()[pairs.order, None].to(rows.dtype)
        out = F.grouped_mm(hidden, e.w2.transpose(1, 2), offs=ends)
        y = torch.zeros_like(tokens).index_add_(0, pairs.token, out)
        assert self.shared_experts is not None
        return y.view_as(x) + self.shared_experts(x), experts


KINDS = {"ours": MixtureOfExperts, "loop": Loop, "grouped_mm": Grouped}


def make_layers(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, MixtureOfExperts]:
    """One of each kind, with the same weights."""
    config = MoEConfig(
        num_experts=args.experts, num_experts_per_token=args.chosen, intermediate_size=args.width
    )
    layers = {}
    for name, kind in KINDS.items():
        torch.manual_seed(0)
        layer = kind(args.hidden, config)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=args.hidden**-0.5)
        layers[name] = layer.to(dtype)
    return layers


def step(layer: MixtureOfExperts, x: Tensor, weight: Tensor) -> list[Tensor]:
    """Output and the gradients of input and parameters."""
    y = layer(x)[0]
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], weight)]


def that_run(layers: dict[str, MixtureOfExperts], x: Tensor, weight: Tensor) -> list[str]:
    """The contestants that torch can run here; all of them agree."""
    expected, running = step(layers["ours"], x, weight), []
    near = 1e-4 if x.dtype is torch.float32 else 0.05
    for name, layer in layers.items():
        try:
            found = step(layer, x, weight)
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            print(f"{name} does not run for {x.dtype} on {x.device.type}: {error}".splitlines()[0])
            continue
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine - theirs).norm() <= near * theirs.norm(), f"{name} computes another result"
        running.append(name)
    return running


def contest(args: argparse.Namespace, precision: str) -> None:
    """Prints a line per contestant."""
    dtype = DTYPES[precision]
    x = torch.randn(args.tokens, args.hidden, dtype=dtype, requires_grad=True)
    weight, layers = torch.randn_like(x), make_layers(args, dtype)
    rounds: list[dict[str, float]] = []
    names = that_run(layers, x, weight)
    for _ in range(args.rounds):
        took = {}
        for name in names:
            started = time.perf_counter()
            step(layers[name], x, weight)
            took[name] = time.perf_counter() - started
        rounds.append(took)
    for name in names:
        ms = 1e3 * statistics.median(took[name] for took in rounds)
        ratios = sorted(took[name] / took["ours"] for took in rounds)
        scatter = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"| {precision} | {name} | {ms:.0f} | {scatter} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=64, help="of the layer (%(default)s)")
    parser.add_argument("--chosen", type=int, default=8, help="per token (%(default)s)")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size (%(default)s)")
    parser.add_argument("--width", type=int, default=256, help="of an expert (%(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="that are timed (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a smoke run; figures mean nothing")
    args = parser.parse_args()
    if args.quick:
        args.experts, args.hidden, args.width, args.tokens, args.rounds = 8, 32, 16, 64, 1
    print(
        f"{args.tokens} tokens x {args.hidden}, {args.experts} experts of {args.width}, "
        f"{args.chosen} per token, {torch.get_num_threads()} threads\n"
    )
    print("| precision | experts | ms | time / ours |\n|---|---|---|---|")
    for precision in DTYPES:
        contest(args, precision)


if __name__ == "__main__":
    main()
