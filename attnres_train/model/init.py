"""Initial weights that depend on the seed and each tensor's released name alone: not on the
pipeline layout, the device or the parameter dtype."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from attnres_train.config.model_schema import ModelConfig
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.kda.layer import init_decay_
from attnres_train.model.moe.layer import routers
from attnres_train.model.naming import released_tensors
from attnres_train.model.residual.hyper_connections import init_gates_


@torch.no_grad()
def init_weights(chunk: ModelChunk, seed: int) -> None:
    """Fill every parameter and router buffer of ``chunk`` (which may come from ``to_empty``).

    Norm weights are 1 and pseudo-queries 0 (arXiv 2603.15031, section 2: reads start as the mean of
    their sources), as are other scores and input-dependent queries. DenseFormer starts as the
    identity, hyper-connections as `init_gates_` says. Embedding, projections, router and experts
    are N(0, ``initializer_range``), the decay of KDA is `init_decay_`'s, and short convolutions are
    U(-1, 1) / sqrt(taps), torch's default for such a convolution. Values are drawn in fp32 on the
    CPU, one generator per released tensor.
    """
    for name, tensor in released_tensors(chunk.named_parameters()):
        tensor.copy_(_draw(name, tensor.shape, _generator(seed, name), chunk.config))
    for router in routers(chunk):
        router.e_score_correction_bias.zero_()
        router.tokens_per_expert.zero_()


def _draw(name: str, shape: torch.Size, rng: torch.Generator, config: ModelConfig) -> Tensor:
    value = torch.empty(shape)
    if name.endswith("norm.weight"):
        return value.fill_(1.0)
    if name.endswith(("_res_proj.weight", "_res_query.weight", "_res_scores")):
        return value.zero_()
    if name.endswith("_res_weights"):
        value.zero_()[-1] = 1
        return value
    if "_res_gate" in name:
        return init_gates_(value, name, config.residual.num_streams)
    if name.endswith(("A_log", "dt_bias")):
        return init_decay_(value, name.rsplit(".", 1)[1], config.kda, rng)
    if name.endswith("conv1d.weight"):
        bound = shape[-1] ** -0.5
        return nn.init.uniform_(value, -bound, bound, generator=rng)
    return nn.init.normal_(value, std=config.initializer_range, generator=rng)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
