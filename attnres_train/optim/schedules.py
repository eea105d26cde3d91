"""Learning-rate schedules."""

from __future__ import annotations

import math

from attnres_train.config.schema import LRScheduleConfig


def learning_rate(step: int, schedule: LRScheduleConfig, peak: float, train_iters: int) -> float:
    """Learning rate of update ``step`` (1 = the run's first): a pure function, nothing to save.

    Linear warm-up ``peak * step / warmup_iters`` reaches the peak at step ``warmup_iters``. Then,
    with ``low = peak * min_lr_ratio``:

    - ``cosine``: half a cosine from the warm-up's end to ``low`` at step ``decay_iters`` (default
      ``train_iters``) and ``low`` from there on. Moonlight's pre-training: 2k warm-up steps, 4.2e-4
      to 4.2e-5 (arXiv 2502.16982).
    - ``wsd``: the peak, then a straight line to ``low`` over the last ``decay_iters`` steps
      (default a fifth of the run). With ``min_lr_ratio: 0`` the end of Moonlight's cool-down. Kimi
      K2 (arXiv 2507.20534) has a cosine for the line: 500 warm-up steps, 2e-4 to 2e-5.
    - ``constant``: the peak.
    """
    if step < 1:
        raise ValueError(f"updates are counted from 1, not {step}")
    warmup = schedule.warmup_iters
    if step <= warmup:
        return peak * step / warmup
    low = peak * schedule.min_lr_ratio
    if schedule.kind == "cosine":
        done = _progress(step, warmup, schedule.decay_iters or train_iters)
        return low + (peak - low) * (1 + math.cos(math.pi * done)) / 2
    if schedule.kind == "wsd":
        length = schedule.decay_iters or max(1, train_iters // 5)
        return peak + (low - peak) * _progress(step, max(warmup, train_iters - length), train_iters)
    return peak


def _progress(step: int, start: int, end: int) -> float:
    """Share of the way from ``start`` to ``end``, within 0 and 1."""
    return min(1.0, max(0, step - start) / max(1, end - start))
