"""An optimizer as a user writes it, in a file of its own: Lion (arXiv 2302.06675)."""

import torch
from pydantic import Field

from attnres_train.config.section import Section
from attnres_train.optim.kinds import OptimizerKind


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr, betas, weight_decay):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            (fast, slow), lr = group["betas"], group["lr"]
            for param in group["params"]:
                momentum = self.state[param]["momentum"]
                update = torch.lerp(param.grad, momentum, fast).sign_()
                param.mul_(1 - lr * group["weight_decay"]).sub_(update, alpha=lr)
                momentum.lerp_(param.grad, 1 - slow)


class LionKind(OptimizerKind):
    """Lion for every parameter."""

    class Options(Section):
        slow: float = Field(0.99, ge=0, lt=1)
        """Beta of the momentum that is kept."""

    def states(self, part):
        return ("momentum",)

    def build(self, part, params, device):
        betas = (self.section.betas[0], self.options.slow)
        return Lion(params, self.section.lr, betas, part.weight_decay)
