"""Runs of one seed and different kinds see the same samples and begin with the same weights."""

from __future__ import annotations

import torch

from attnres_train.data.prepare import prepare
from attnres_train.model.chunk import ModelChunk
from attnres_train.model.init import init_weights
from attnres_train.study.study_file import load_study
from tests.study.helpers import write_study


def test_kinds_of_a_seed_are_pairs(tmp_path):
    runs = [r for r in load_study(write_study(tmp_path)).runs if r.labels["lr"] == "0.005"]
    configs = {(run.labels["kind"], run.labels["seed"]): run.config for run in runs}
    indices, weights = {}, {}
    for key, config in configs.items():
        indices[key] = prepare(config, progress=False).indices  # named by all that orders samples
        chunk = ModelChunk(config.model, 0, config.model.num_layers)
        init_weights(chunk, config.run.seed)
        weights[key] = dict(chunk.named_parameters())
    assert indices["standard", "1"] == indices["static", "1"] != indices["static", "2"]
    standard, static = weights["standard", "1"], weights["static", "1"]
    assert standard.keys() <= static.keys()  # mixing adds what it learns
    assert all(torch.equal(standard[name], static[name]) for name in standard)
    other = weights["standard", "2"]
    assert not torch.equal(standard["embed_tokens.weight"], other["embed_tokens.weight"])
