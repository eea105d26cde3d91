"""Observations: what one micro-batch of a step has shown, as arrays in the run folder.

Arrays are float32. L sublayers are numbered from 1 over the whole model; N blocks, P pipeline
ranks, M layers with experts, E experts. NaN stands where there is nothing: a source that a sublayer
does not have, a read that learns nothing, a gradient where there was no backward pass.

- ``depth_weight_mean``, ``depth_weight_std`` [L + 1, N]: over the tokens of a micro-batch, the
  weight by which sublayer (row + 1; the last row is the output head) reads block (column), the open
  block being its last source. Missing where the residual has no weights over depth.
- ``output_rms`` [L]: root mean square of what a sublayer writes. ``output_gradient_rms`` [L]: of
  the gradient of the micro-batch's loss with respect to that.
- ``stream_rms`` [L + 1]: of the open (or just closed) block after sublayer 0 (the embedding) .. L;
  of the whole stream where there are no blocks. ``block_rms`` [N]: of each finished block.
- ``gradient_norm`` [L + 2]: norm of the step's gradient, before clipping, of the parameters of the
  embedding, of each sublayer with its norm and read, and of the output head.
- ``query_norm`` [L + 1]: norm of the pseudo-query of each read.
- ``expert_load`` [M, E]: share of the step's (token, expert) pairs times E, 1 where even.
  ``expert_layer`` [M]: their layers, from 0. ``expert_entropy``, ``expert_violation`` [M]: as
  `model.moe.balance.Balance` says of all layers.
- ``store_blocks``, ``store_bytes`` [P]: peak of the block store of each pipeline rank in the step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from attnres_train.config.model_schema import ModelConfig
from attnres_train.observe.observer import Observer
from attnres_train.screen import complain

FOLDER = "observed"
Arrays = dict[str, np.ndarray]
Totals = Mapping[str, np.ndarray]
"""Sums over tokens, see `model.probe`, and what else is known by sublayer, layer or rank."""


def arrays_of(model: ModelConfig, totals: Totals) -> Arrays:
    """The arrays that ``totals`` of all ranks, added up, make. Those of which there is nothing are
    left out."""
    depth, plan = model.num_sublayers, model.residual_kind.plan
    arrays = _depth_weights(totals, depth + 1, plan.num_blocks)
    for what in ("output", "output_gradient"):
        arrays[f"{what}_rms"] = _column(totals, what, 1, depth, _rms)
    arrays["stream_rms"] = _column(totals, "stream", 0, depth, _rms)
    arrays["block_rms"] = arrays["stream_rms"][list(plan.ends)]
    arrays["gradient_norm"] = _column(totals, "gradient", 0, depth + 1, np.sqrt)
    arrays["query_norm"] = _column(totals, "query", 1, depth + 1, np.sqrt)
    arrays |= _experts(totals)
    ranks = range(len(_numbers(totals, "store")))
    if ranks:
        blocks, memory = np.stack([totals[f"store/{rank}"] for rank in ranks], -1)
        arrays |= {"store_blocks": blocks, "store_bytes": memory}
    found = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    return {name: array for name, array in found.items() if not np.isnan(array).all()}


def _depth_weights(totals: Totals, rows: int, columns: int) -> Arrays:
    mean, std = np.full((2, rows, columns), np.nan)
    for sublayer in _numbers(totals, "depth_weight"):
        *sums, count = totals[f"depth_weight/{sublayer}"]
        first, second = np.split(np.asarray(sums) / count, 2)
        mean[sublayer - 1, : len(first)] = first
        variance = second - first**2
        # What rounding leaves of a variance of zero is no spread.
        std[sublayer - 1, : len(first)] = np.sqrt(np.where(variance < 1e-14, 0, variance))
    return {"depth_weight_mean": mean, "depth_weight_std": std}


def _experts(totals: Totals) -> Arrays:
    layers = _numbers(totals, "expert_load")
    if not layers:
        return {}
    load = np.stack([totals[f"expert_load/{layer}"] for layer in layers])
    experts = load.shape[1]
    share = load / np.maximum(load.sum(1, keepdims=True), 1)
    terms = np.where(share > 0, -share * np.log(np.where(share > 0, share, 1)), 0)
    return {
        "expert_layer": np.asarray(layers),
        "expert_load": share * experts,
        "expert_entropy": terms.sum(1) / np.log(max(experts, 2)),
        "expert_violation": share.max(1) * experts - 1,
    }


def _column(
    totals: Totals, what: str, first: int, last: int, value: Callable[[np.ndarray], float]
) -> np.ndarray:
    """``value`` of the totals of ``what``, by number from ``first`` to ``last``."""
    found = [totals.get(f"{what}/{number}") for number in range(first, last + 1)]
    return np.array([np.nan if total is None else value(total) for total in found])


def _rms(total: np.ndarray) -> float:
    square_sum, count = total
    return np.sqrt(square_sum / count)


def _numbers(totals: Totals, what: str) -> list[int]:
    parts = (name.split("/") for name in totals)
    return sorted(int(number) for name, number in parts if name == what)


class Kept(Observer):
    """Writes each observation to ``observed/step_00000100.npz`` in the run folder, and keeps
    `observe.keep` of them. Those of steps that a resume or a roll-back undoes are dropped."""

    def on_start(self, step: int) -> None:
        self.folder = self.run.folder / FOLDER
        self.told = False
        self.on_roll_back(step)

    def on_roll_back(self, step: int) -> None:
        for at in observed_steps(self.run.folder):
            if at > step:
                observed_path(self.run.folder, at).unlink()

    def on_observation(self, step: int, arrays: Arrays) -> None:
        path = observed_path(self.run.folder, step)
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(exist_ok=True)
            with open(partial, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]  # by name
            partial.replace(path)
            for dropped in superfluous(
                observed_steps(self.run.folder), self.run.config.observe.keep
            ):
                observed_path(self.run.folder, dropped).unlink()
        except OSError as error:
            if not self.told:
                complain(f"{path} cannot be written: {error}; the run goes on")
            self.told = True


def superfluous(steps: list[int], keep: int) -> list[int]:
    """Of ascending ``steps``, those to drop so that ``keep`` are left: each time the one whose
    neighbours are closest to each other, the earliest of them."""
    left = list(steps)
    while len(left) > max(keep, 2):
        inner = range(1, len(left) - 1)
        del left[min(inner, key=lambda i: left[i + 1] - left[i - 1])]
    return [step for step in steps if step not in set(left)]


def observed_path(run_folder: Path, step: int) -> Path:
    return run_folder / FOLDER / f"step_{step:08d}.npz"


def observed_steps(run_folder: Path) -> list[int]:
    """The steps of which ``run_folder`` holds an observation, ascending."""
    names = (re.fullmatch(r"step_(\d+)\.npz", p.name) for p in (run_folder / FOLDER).glob("*.npz"))
    return sorted(int(name[1]) for name in names if name)


def read_observation(run_folder: Path, step: int | None = None) -> Arrays:
    """The arrays of ``step`` (default: the latest that there is); none where there is none."""
    steps = observed_steps(run_folder)
    step = step if step is not None else steps[-1] if steps else 0
    if step not in steps:
        return {}
    with np.load(observed_path(run_folder, step), allow_pickle=False) as file:
        return dict(file)
