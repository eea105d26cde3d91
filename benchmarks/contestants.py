"""Ways to carry the history, and the pipelines on which the step-time benchmark tries them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import small_model
from attnres_train.model.blocks import Blocks
from attnres_train.pipeline.plan.layout import Layout, even_bounds
from attnres_train.pipeline.plan.schedule import one_f_one_b
from attnres_train.pipeline.plan.simulate import Costs, simulate
from attnres_train.pipeline.plan.transport_plan import TransportPlan
from link_bound import step_bound
from transports import LatePlan, NaivePlan, PaddedPlan

SUBLAYERS, BLOCK_SIZE = 54, 6
# Contestant -> its transport plan, and the simulator's name for it.
PLANS: dict[str, tuple[type[TransportPlan], str | None]] = {
    "standard": (TransportPlan, "standard"),
    "torch": (TransportPlan, None),
    "naive": (NaivePlan, "naive"),
    "padded": (PaddedPlan, "padded"),
    "exact": (LatePlan, "exact"),
    "eager": (TransportPlan, "eager"),
}


@dataclass(frozen=True)
class Row:
    """A pipeline: P, V and M; ``compute`` says of what chunks."""

    ranks: int
    virtual: int
    micro_batches: int
    compute: Literal["sleep", "paced", "model"] = "sleep"

    def layout(self, standard: bool) -> Layout:
        if self.compute != "sleep":
            block_size = None if standard else small_model.BLOCK_SIZE
            return small_model.layout(self.ranks, self.virtual, block_size)
        block_size = None if standard else BLOCK_SIZE
        bounds = even_bounds(SUBLAYERS, self.ranks * self.virtual)
        return Layout(Blocks(SUBLAYERS, block_size), bounds, self.ranks, sublayers_per_layer=1)

    def plan(self, name: str) -> TransportPlan:
        return PLANS[name][0](self.layout(name == "standard"))

    def ideal(self, seconds: float) -> float:
        """Of the standard residual on links that cost nothing."""
        return 3 * seconds * (self.virtual * self.micro_batches + self.ranks - 1)

    def _costs(self, seconds: float, unit: float) -> Costs:
        chunks = self.ranks * self.virtual
        return Costs([seconds] * chunks, [2 * seconds] * chunks, unit)

    def simulated(self, name: str, seconds: float, unit: float) -> float | None:
        """Seconds of a step by the simulator, a forward pass taking ``seconds`` and a unit on a
        link ``unit`` seconds; None for what it does not know."""
        mode = PLANS[name][1]
        if mode is None:
            return None
        schedule = one_f_one_b(self.ranks, self.virtual, self.micro_batches)
        plan, costs = self.plan("eager"), self._costs(seconds, unit)
        # The ring has a link to each neighbour, so what goes one way does not queue with the other.
        timeline = simulate(plan, schedule, costs, mode, record=False, port_per_neighbour=True)
        return timeline.seconds

    def bound(self, seconds: float, unit: float) -> float:
        """Least seconds of a step with the exact payload, in any order of sending."""
        schedule = one_f_one_b(self.ranks, self.virtual, self.micro_batches)
        return step_bound(self.plan("eager"), schedule, self._costs(seconds, unit))

    def report(self, passes: dict[str, float], unit: float, times: dict[str, float]) -> str:
        """A line of the table: times over the standard residual's, in brackets the simulator's and
        simulated over measured; last the bound and by how much the eager transport misses it.
        ``passes`` are the seconds of a forward pass, ``unit`` the link's over the standard's."""
        link = unit * passes["standard"]
        guesses = {name: self.simulated(name, passes[name], link) for name in times}
        base, base_guess = times["standard"], guesses["standard"]
        cells = [f"{1e3 * base:.0f} ({1e3 * base_guess:.0f})"]
        for name, time in times.items():
            if name == "standard":
                continue
            guess = guesses[name]
            note = f" ({guess / base_guess - 1:+.1%}, {guess / time:.2f})" if guess else ""
            cells.append(f"{time / base - 1:+.1%}{note}")
        if "eager" in times:
            bound = self.bound(passes["eager"], link)
            cells.append(f"{1e3 * bound:.0f} ({times['eager'] / bound - 1:+.1%})")
        shape = f"{self.ranks}, {self.virtual}, {self.micro_batches}"
        return f"| {shape} | {unit:g} | {' | '.join(cells)} |"


def table_head(names: list[str]) -> str:
    columns = ["P, V, M", "unit / t", *names, *(["bound"] if "eager" in names else [])]
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
