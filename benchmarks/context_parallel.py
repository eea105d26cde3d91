"""Bytes and time of one KDA and one MLA layer whose samples are shared by ranks, in one run.

KDA: *one pass* is the exchange as it is (a share's outputs, its map of the state in front of it,
and what that state adds, in one pass); *two passes* runs a share for its map and once more from the
state that enters, which sends the same; *gathered* brings all inputs of the layer to every rank,
which computes the whole sample. MLA: *latents* is the exchange as it is; *heads* gathers keys and
values after they are made of the latent. Outputs and gradients of the input are compared. Bytes are
those that a rank sends to others, forward and backward; time is the processor's, of the rank that
takes longest, so that a busy machine can tell it too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from attnres_train.config.model_schema import KDAConfig, MLAConfig
from attnres_train.model.kda.layer import KimiDeltaAttention
from attnres_train.model.mla import MultiHeadLatentAttention, causal_attention
from attnres_train.model.ports import Recurrence, SequenceExchange
from attnres_train.parallel.context import ContextExchange
from attnres_train.parallel.shares import Scan

Layer = Callable[[Tensor], Tensor]


class TwoPasses(ContextExchange):
    """Maps in one pass over the tokens, outputs in another."""

    def recur(self, recurrence: Recurrence, values: Tensor, key_size: int) -> Tensor:
        rows, _, heads, value_size = values.shape
        zeros = values.new_zeros(*values.shape[:-1], key_size)
        start = values.new_zeros(rows, heads, key_size, value_size + key_size)
        start[..., value_size:] = torch.eye(key_size)
        after = recurrence(torch.cat((values, zeros), dim=-1), start)[1]
        assert after is not None
        entering = Scan.apply(self.peers, after.unflatten(0, (-1, len(self.shares.own))))
        return recurrence(values, entering.flatten(0, 1))[0]


class GatheredHeads(MultiHeadLatentAttention):
    """Keys and values of all heads travel."""

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        c = self.config
        q = self.q_proj(x).unflatten(-1, (c.num_heads, -1))
        latent, shared = self.kv_a_proj_with_mqa(x).split(
            [c.kv_lora_rank, c.qk_rope_head_dim], dim=-1
        )
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (c.num_heads, -1))
        nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        k = torch.cat([nope, shared.unsqueeze(2).expand(-1, -1, c.num_heads, -1)], dim=-1)
        gathered = self.sequence.gather([k.flatten(2), v.flatten(2)])
        k, v = (y.unflatten(-1, (c.num_heads, -1)) for y in gathered)
        o = causal_attention(q, k, v, None, self.sequence.shares)
        return self.o_proj(o.flatten(2))


def of_all_tokens(layer: nn.Module, exchange: ContextExchange) -> Layer:
    """``layer``, a single process's, over the inputs up to the last that is here."""

    def run(x: Tensor) -> Tensor:
        (known,) = exchange.gather([x])
        own, y = exchange.shares.own, layer(known)
        size = x.shape[1] // len(own)
        return torch.cat([y[:, share * size : (share + 1) * size] for share in own], dim=1)

    return run


def contestants(args: argparse.Namespace) -> dict[str, tuple[Layer, ContextExchange]]:
    """Each with weights of the same seed and an exchange of its own, which counts."""
    size = args.head_size
    kda = KDAConfig(num_heads=args.heads, head_dim=size)
    mla = MLAConfig(
        num_heads=args.heads,
        kv_lora_rank=4 * size,
        qk_nope_head_dim=size,
        qk_rope_head_dim=size // 2,
        v_head_dim=size,
    )

    def kda_layer(sequence: SequenceExchange | None) -> nn.Module:
        torch.manual_seed(0)
        return KimiDeltaAttention(args.hidden, kda, 1e-5, sequence=sequence)

    def mla_layer(kind: type[MultiHeadLatentAttention], sequence: SequenceExchange) -> nn.Module:
        torch.manual_seed(0)
        return kind(args.hidden, mla, sequence=sequence)

    exchange = [ContextExchange(dist.group.WORLD) for _ in range(4)]
    both = TwoPasses(dist.group.WORLD)
    return {
        "KDA, one pass": (kda_layer(exchange[0]), exchange[0]),
        "KDA, two passes": (kda_layer(both), both),
        "KDA, gathered": (of_all_tokens(kda_layer(None), exchange[1]), exchange[1]),
        "MLA, latents": (mla_layer(MultiHeadLatentAttention, exchange[2]), exchange[2]),
        "MLA, heads": (mla_layer(GatheredHeads, exchange[3]), exchange[3]),
    }


def measure(rank: int, store: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    files = dist.FileStore(store, args.ranks)
    dist.init_process_group("gloo", store=files, rank=rank, world_size=args.ranks)
    layers = contestants(args)
    for length in args.tokens:
        torch.manual_seed(1)
        whole = torch.randn(1, length, args.hidden)
        seconds: dict[str, list[float]] = {name: [] for name in layers}
        sent: dict[str, int] = {}
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for _ in range(args.rounds + 1):
            for name, (layer, exchange) in layers.items():
                x = exchange.shares.of(whole).requires_grad_()
                before = exchange.bytes_sent
                dist.barrier()
                started = time.process_time()
                y = layer(x)
                y.square().sum().backward()
                seconds[name].append(time.process_time() - started)
                assert x.grad is not None
                found[name], sent[name] = (y.detach(), x.grad), exchange.bytes_sent - before
        for names in (("one pass", "two passes", "gathered"), ("latents", "heads")):
            first, *others = (v for name, v in found.items() if name.split(", ")[1] in names)
            for pair in ((first, other) for other in others):
                for mine, theirs in zip(*pair, strict=True):
                    assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4)
        for name, took in seconds.items():
            medians = torch.empty(args.ranks)
            mine = torch.tensor([statistics.median(took[1:])])
            dist.all_gather(list(medians.split(1)), mine)
            if rank == 0:
                row = (length, name, f"{sent[name]:,}", f"{medians.max():.3f} s")
                print(f"| {' | '.join(map(str, row))} |", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="processes (%(default)s)")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size (%(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="of both layers (%(default)s)")
    parser.add_argument("--head-size", type=int, default=128, help="of KDA's (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="that are timed (%(default)s)")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024, 4096, 8192], help="of a sample"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    args = parser.parse_args()
    if args.quick:
        args.hidden, args.heads, args.head_size = 16, 2, 8
        args.tokens, args.rounds = [32], 1
    print(f"{args.ranks} ranks, {args.heads} heads of {args.head_size}, hidden {args.hidden}, fp32")
    print(
        "| tokens | contestant | bytes sent per rank | processor time |\n|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (str(Path(folder) / "store"), args), nprocs=args.ranks)


if __name__ == "__main__":
    main()
