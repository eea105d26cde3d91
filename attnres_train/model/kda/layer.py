"""Kimi Delta Attention, the module: projections, short convolutions, decay, output gate.

Parameter names, shapes and arithmetic are those of the released Kimi-Linear-48B-A3B (arXiv
2510.26692, section 4). Shapes: B batch, T tokens, S those in the stream, D hidden size, H heads
here, K head size, P = H K; R rows of t tokens, the shares of the samples that are here
(`model.shares`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attnres_train.config.model_schema import KDAConfig
from attnres_train.model.kda.gated import continued_kda, gated_kda
from attnres_train.model.kda.inputs import DecayGate, KDAInputs
from attnres_train.model.kda.short_conv import ShortConv
from attnres_train.model.norm import RMSNorm
from attnres_train.model.parameters import Initialiser, ParameterRule, matrices
from attnres_train.model.ports import Past, SequenceExchange, WholeSamples
from attnres_train.model.shares import cumulative
from attnres_train.model.split import TensorSplit, Whole


class KimiDeltaAttention(nn.Module):
    """KDA sublayer, [B, S, D] -> [B, S, D]; the input is already normed. Heads are split by
    ``split`` (default: all are here).

    ``A_log`` [1, 1, H, 1] and ``dt_bias`` [P] shape the decay and must stay fp32 (or fp64) when the
    other parameters are cast: cast parameter by parameter and leave these two out, since
    ``module.to(torch.bfloat16)`` would round them. ``sequence`` is the port to the rest of the
    samples (default: they are whole).
    """

    def __init__(
        self,
        hidden_size: int,
        config: KDAConfig,
        norm_eps: float,
        split: TensorSplit | None = None,
        sequence: SequenceExchange | None = None,
    ) -> None:
        super().__init__()
        self.split = split = split or Whole()
        self.sequence = sequence or WholeSamples()
        size, whole = config.head_dim, config.num_heads * config.head_dim
        heads = len(split.share(config.num_heads))
        width = heads * size
        self.config = config
        self.heads, self.chunk_size = heads, config.chunk_size
        self.lower_bound = config.lower_bound
        self.q_proj = split.column(hidden_size, whole)
        self.k_proj = split.column(hidden_size, whole)
        self.v_proj = split.column(hidden_size, whole)
        self.q_conv1d = ShortConv(width, config.short_conv_kernel_size)
        self.k_conv1d = ShortConv(width, config.short_conv_kernel_size)
        self.v_conv1d = ShortConv(width, config.short_conv_kernel_size)
        self.A_log = nn.Parameter(init_decay_(torch.empty(1, 1, heads, 1), "A_log", config))
        self.dt_bias = nn.Parameter(init_decay_(torch.empty(width), "dt_bias", config))
        self.f_a_proj = nn.Linear(hidden_size, size, bias=False)
        self.f_b_proj = split.column(size, whole)
        self.g_a_proj = nn.Linear(hidden_size, size, bias=False)
        self.g_b_proj = split.column(size, whole)
        self.b_proj = split.column(hidden_size, config.num_heads)
        self.o_norm = RMSNorm(size, norm_eps)
        self.o_proj = split.row(whole, hidden_size)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None = None, past: Past | None = None
    ) -> Tensor:
        """``cu_seqlens`` [0, ..., B*T]: cumulative lengths of documents packed into the rows, which
        then see nothing of each other. ``past`` (not with documents): what rows go on from."""
        sequence: SequenceExchange = past or self.sequence
        x = self.split.gather(x)
        rows = sequence.shares.rows
        projected = [rows(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj)]
        q, k, v = map(self._heads, self._convolved(projected, cu_seqlens, sequence))
        decay, beta = self._heads(self.f_b_proj(self.f_a_proj(x))), self.b_proj(x)
        o = self._recurred(KDAInputs(q, k, v, rows(decay), rows(beta)), cu_seqlens, sequence)
        o = sequence.shares.joined(o)
        gate = self._heads(self.g_b_proj(self.g_a_proj(x)))
        # As released: a sigmoid and not SiLU, after the norm, which would undo a factor of a head.
        y = self.o_proj((self.o_norm(o) * gate.sigmoid()).flatten(2))
        return self.split.scatter(y)

    def _convolved(
        self, rows: list[Tensor], cu_seqlens: Tensor | None, sequence: SequenceExchange
    ) -> list[Tensor]:
        """q, k and v [R, t, P] after their short convolutions, which reach back to the tokens in
        front of a row."""
        convs, length = (self.q_conv1d, self.k_conv1d, self.v_conv1d), rows[0].shape[1]
        led = sequence.led(rows, self.config.short_conv_kernel_size - 1)
        before = led[0].shape[1] - length
        if before and cu_seqlens is not None:
            starts = sequence.shares.starts(cu_seqlens, rows[0].shape, before)
            cu_seqlens = cumulative(starts)
        return [conv(x, cu_seqlens)[:, before:] for conv, x in zip(convs, led, strict=True)]

    def _recurred(
        self, raw: KDAInputs, cu_seqlens: Tensor | None, sequence: SequenceExchange
    ) -> Tensor:
        """o [R, t, H, V]; each row goes on with the state in front of it."""
        gate, size = self.decay_gate, self.chunk_size

        def recurrence(values: Tensor, states: Tensor | None) -> tuple[Tensor, Tensor | None]:
            inputs = raw._replace(v=values)
            if states is None:
                return gated_kda(inputs, gate, cu_seqlens=cu_seqlens, chunk_size=size), None
            starts = None
            if cu_seqlens is not None:
                starts = sequence.shares.starts(cu_seqlens, raw.k.shape)
            return continued_kda(inputs, gate, states, starts, size)

        return sequence.recur(recurrence, raw.v, raw.k.shape[-1])

    def parameter_rules(self, std: float) -> dict[str, ParameterRule]:
        qkv = (f"{x}_proj.weight" for x in ("q", "k", "v"))
        rules = matrices(std, qkv, heads=self.heads, split=0)
        rules |= matrices(std, ("f_a_proj.weight", "g_a_proj.weight"), role="low_rank")
        rules |= matrices(std, ("f_b_proj.weight", "g_b_proj.weight"), role="low_rank", split=0)
        rules |= matrices(std, ["b_proj.weight"], split=0)
        rules |= matrices(std, ["o_proj.weight"], split=1)
        for name, axis in (("A_log", 2), ("dt_bias", 0)):
            init = decay_init(name, self.config)
            rules[name] = ParameterRule(init, weight_decay=False, split=axis)
        return rules

    @property
    def decay_gate(self) -> DecayGate:
        return DecayGate(self.A_log, self.dt_bias, self.lower_bound)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


@torch.no_grad()
def init_decay_(
    tensor: Tensor, name: str, config: KDAConfig, generator: torch.Generator | None = None
) -> Tensor:
    """Initialises ``A_log`` or ``dt_bias`` (the ``name``) in place, as Kimi-Linear's code does.

    A_log is log U(1, 16), and 0 for the gate with a lower bound b. dt_bias is the inverse softplus
    of a step size dt that is log-uniform in [1e-3, 1e-1]: a token without input has the log-decay
    -A dt, or b (1 - exp(-dt)).
    """
    if name == "A_log":
        if config.lower_bound is not None:
            return tensor.zero_()
        return tensor.uniform_(1, 16, generator=generator).log_()
    if name != "dt_bias":
        raise ValueError(f"no initialisation for {name}: it is A_log or dt_bias")
    dt = tensor.uniform_(math.log(1e-3), math.log(1e-1), generator=generator).exp_()
    return tensor.copy_(dt + torch.log(-torch.expm1(-dt)))


def decay_init(name: str, config: KDAConfig) -> Initialiser:
    """`init_decay_` of ``A_log`` or ``dt_bias`` (the ``name``)."""
    return lambda tensor, rng: init_decay_(tensor, name, config, rng)


def kda_flops_per_token(hidden_size: int, config: KDAConfig) -> float:
    """Forward FLOPs of the sublayer per token: projections, convolutions (a multiply-add is two)
    and the chunked recurrence, 6 K^2 + 3 C K + C^2 per head (arXiv 2510.26692, Eq. 13)."""
    heads, size, chunk = config.num_heads, config.head_dim, config.chunk_size
    width = heads * size
    projections = 4 * hidden_size * width + 2 * size * (hidden_size + width) + hidden_size * heads
    convolutions = 3 * width * config.short_conv_kernel_size
    recurrence = heads * (6 * size**2 + 3 * chunk * size + chunk**2)
    return 2.0 * (projections + convolutions) + recurrence
