"""Steps whose loss or gradient is not finite: passed over by all ranks alike, and the end of a run
that has too many of them in a row."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.distributed import ProcessGroup, all_gather_object

from attnres_train.screen import complain
from attnres_train.words import some_of

SHOWN_STEPS = 5
SHOWN_PARAMETERS = 5


class Skips:
    """Counts the steps that are passed over, on every rank alike.

    ``limit`` is `train.max_skipped_steps`; ``chunks`` are this rank's, ``control`` is all ranks.
    ``why``, collective, tells of a cause that is known, if there is one.
    """

    def __init__(
        self,
        limit: int,
        chunks: Mapping[int, nn.Module],
        control: ProcessGroup,
        why: Callable[[], str] = str,
    ) -> None:
        self.limit, self.chunks, self.control, self.why = limit, chunks, control, why
        self.in_a_row = 0
        self._before: deque[tuple[int, float, float]] = deque(maxlen=SHOWN_STEPS)

    def passes_over(self, step: int, loss: float, grad_norm: float, is_main: bool) -> bool:
        """Whether step ``step``, of this loss and gradient norm over all ranks, must not be taken.
        Its gradients are still there. Collective.

        Raises FloatingPointError where it is the one too many, with what led to it.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            self._before.append((step, loss, grad_norm))
            return False
        self.in_a_row += 1
        what = f"the gradient norm of step {step} is {grad_norm}, its loss {loss:.6g}"
        where = self.why() or self._where()
        if self.in_a_row > self.limit:
            count = f"{self.in_a_row} such steps in a row" if self.limit else "the first such step"
            raise FloatingPointError(
                f"{what} ({count}; train.max_skipped_steps is {self.limit}): parameters are "
                "unchanged since the last step that was taken; resume from a checkpoint of before "
                "with a lower optimizer.lr, a longer lr_schedule.warmup_iters or "
                f"train.precision=fp32\n{where}\n{self._history()}"
            )
        if is_main:
            complain(f"{what}: passed over, {self.in_a_row} in a row; {where}")
        return True

    def _where(self) -> str:
        """Which gradients are not finite, over all ranks; each replica has those that it owns."""
        mine, sizes = set(), {}
        for index, chunk in self.chunks.items():
            named = list(chunk.named_parameters())
            sizes[index] = len(named)
            for place, (name, p) in enumerate(named):
                if p.grad is not None and _broken(p.grad):
                    mine.add((index, place, name))
        ranks: list[tuple[set[tuple[int, int, str]], dict[int, int]]]
        ranks = [(set(), {})] * self.control.size()
        all_gather_object(ranks, (mine, sizes), group=self.control)
        # The backward pass goes from the last to the first: what it met first.
        found = set().union(*(of_rank for of_rank, _ in ranks))
        names = [name for *_, name in sorted(found, reverse=True)]
        total = sum({i: size for _, of_rank in ranks for i, size in of_rank.items()}.values())
        if not names:
            return "every gradient is finite"
        return (
            f"{len(names)} of {total} gradients are not finite, in the order of the backward pass: "
            + some_of(names, SHOWN_PARAMETERS)
        )

    def _history(self) -> str:
        told = [f"step {s}: loss {loss:.6g}, gradient norm {n:.6g}" for s, loss, n in self._before]
        return "\n".join(["the last steps that were taken:", *(told or ["none in this attempt"])])


def _broken(gradient: torch.Tensor) -> bool:
    return not bool(torch.isfinite(gradient).all())
