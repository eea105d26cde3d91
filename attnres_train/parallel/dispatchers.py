"""Which exchange of tokens and experts a run has (`parallel.expert_dispatcher`)."""

from __future__ import annotations

from torch.distributed import ProcessGroup

from attnres_train.config.schema import RunConfig
from attnres_train.model.ports import AllHere, TokenExchange
from attnres_train.parallel.bounded import BoundedExchange
from attnres_train.parallel.deepep import DeepEPExchange
from attnres_train.parallel.experts import ExpertExchange


def token_exchange(config: RunConfig, group: ProcessGroup) -> TokenExchange:
    """The exchange among the ranks of ``group``, each with as many of the experts.

    Raises UserError where `deepep` cannot be had.
    """
    num_experts, parallel = config.model.moe.num_experts, config.parallel
    if group.size() == 1:
        return AllHere(num_experts)
    if parallel.expert_dispatcher == "bounded":
        return BoundedExchange(config.model.moe, group, parallel.expert_capacity_factor)
    if parallel.expert_dispatcher == "deepep":
        return DeepEPExchange(num_experts, group)
    return ExpertExchange(num_experts, group)
