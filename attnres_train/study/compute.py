"""What a run's training costs, on the axis of scaling laws."""

from __future__ import annotations

from attnres_train.config.schema import RunConfig
from attnres_train.model.flops import training_flops_per_token


def model_flops_per_token(config: RunConfig) -> float:
    """FLOPs per trained token without embedding and output head: the accounting with which
    arXiv 2603.15031's Table 2 gives the fits of its Fig. 4 (tests/study/test_power_law.py)."""
    model = config.model
    head = 3 * 2.0 * model.hidden_size * model.vocab_size
    return training_flops_per_token(model, config.train.seq_length) - head
