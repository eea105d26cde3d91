"""Several torch optimizers as one, with fp32 masters for half-precision parameters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnres_train.optim.ports import AllHere, MatrixExchange


def make_masters(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the optimizer updates: fp32 copies of bf16 and fp16 parameters, others themselves."""
    return {
        name: param.detach().float() if needs_master(param) else param
        for name, param in params.items()
    }


def needs_master(param: Tensor) -> bool:
    """Whether the precision of ``param`` is too low to collect updates."""
    return param.dtype in (torch.bfloat16, torch.float16)


class HybridOptimizer:
    """Several torch optimizers over ``masters`` as one optimizer over ``params`` (same names).

    A parameter that has a master of its own is updated through it: its gradient is upcast, the
    result rounded back. A gradient that is None counts as zero, and ``parts`` come with their state
    created: names and values of the state do not depend on which parameters took part in a step.
    ``exchange`` is what ``parts`` share, if they need one.

    State is saved whole or not at all: ``step``, which all parameters share, and tensors of the
    parameter's shape that stay the same objects. Anything else raises ValueError, here or in the
    first step that brings it.
    """

    def __init__(
        self,
        params: dict[str, Tensor],
        masters: dict[str, Tensor],
        parts: list[torch.optim.Optimizer],
        exchange: MatrixExchange | None = None,
    ) -> None:
        self._params = params
        self._masters = masters
        self._parts = parts
        self._exchange = exchange or AllHere()
        self.steps = torch.zeros((), dtype=torch.int64)
        """Updates done so far, int64 []. Saved, and loaded in place, like the state tensors."""
        self._state = list(self._find_state())

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update of every parameter with learning rate ``lr``."""
        for name, param in self._params.items():
            self._hand_over_grad(param, self._masters[name])
        self._exchange.begin()
        for part in self._parts:
            self._prepare(part, lr)
            part.step()
        self._check_state()
        self.steps += 1
        for name, master in self._own_masters():
            self._params[name].copy_(master)
            master.grad = None

    @torch.no_grad()
    def scale(self, name: str, factors: Tensor) -> None:
        """Multiply parameter ``name`` and its master by ``factors``, which can be broadcast to it.
        The rest of its state stays."""
        param, master = self._params[name], self._masters[name]
        master.mul_(factors.to(master.dtype))
        if master is not param:
            param.copy_(master)

    def _hand_over_grad(self, param: Tensor, master: Tensor) -> None:
        if param.grad is None:
            master.grad = torch.zeros_like(master)
        elif master is not param:
            master.grad = param.grad.float()

    def _prepare(self, part: torch.optim.Optimizer, lr: float) -> None:
        for group in part.param_groups:
            group["lr"] = lr
        # torch counts steps per parameter; one count is saved, and written to all of them here.
        for state in part.state.values():
            step = state.get("step")
            if isinstance(step, Tensor):
                step.fill_(int(self.steps))
            elif step is not None:
                state["step"] = int(self.steps)

    def zero_grad(self) -> None:
        """Free all gradients."""
        for param in self._params.values():
            param.grad = None

    def state_tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """(parameter name, state key, tensor of the parameter's shape) of the whole state, in a
        fixed order. The tensors are the live ones: load into them in place."""
        yield from self._state
        yield from ((name, "master", master) for name, master in self._own_masters())

    def _find_state(self) -> Iterator[tuple[str, str, Tensor]]:
        states = {id(param): state for part in self._parts for param, state in part.state.items()}
        for name, master in self._masters.items():
            for key, value in states.get(id(master), {}).items():
                if key == "step" or value is None:
                    continue
                if not (isinstance(value, Tensor) and value.shape == master.shape):
                    raise ValueError(
                        f"the optimizer's state {key!r} of {name} is not of the parameter's shape "
                        f"{tuple(master.shape)}: it could be neither saved nor restored"
                    )
                yield name, key, value

    def _check_state(self) -> None:
        """Raise ValueError unless the state is made of the very tensors that are saved."""
        known = {(name, key): tensor for name, key, tensor in self._state}
        for name, key, tensor in self._find_state():
            if known.get((name, key)) is not tensor:
                raise ValueError(
                    f"the optimizer's state {key!r} of {name} came with a step or was replaced in "
                    "it, and would not be saved: name it in `states` of the optimizer's kind, and "
                    "change it in place"
                )

    def _own_masters(self) -> Iterator[tuple[str, Tensor]]:
        for name, master in self._masters.items():
            if master is not self._params[name]:
                yield name, master
