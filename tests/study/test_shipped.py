"""The studies that come with the package: each expands to runs that pass the checks, and is of the
size that it says."""

from __future__ import annotations

from functools import cache

import pytest

from attnres_train.config.shipped import names, studies
from attnres_train.model.flops import training_flops_per_token
from attnres_train.planning.facts import count_parameters
from attnres_train.study.compute import model_flops_per_token
from attnres_train.study.study_file import Study, load_study


@cache
def study_of(name: str) -> Study:
    return load_study(name, files=False)


@pytest.mark.parametrize("name", studies())
def test_it_expands_to_valid_runs(name):
    study = study_of(name)
    assert study.settings.study.name == name
    assert len({run.name for run in study.runs}) == len(study.runs)
    axes = {axis.name: len(axis.values) for axis in study.settings.axes}
    assert (
        study.settings.report.compare == "kind" and "standard" in study.settings.axis("kind").values
    )
    seeds = axes["seed"]
    assert seeds >= 3 or not name.endswith("_small")
    # One seed is whole before the next begins.
    first = {run.labels["seed"] for run in study.runs[: len(study.runs) // seeds]}
    assert len(first) == 1


def test_studies_are_no_configurations_of_a_run():
    assert {"table2", "gain_small", "gpu_quarter_hour"} <= set(studies())
    assert not any("studies" in name for name in names())


def kinds_of(name: str) -> dict:
    return {run.labels["kind"]: run.config.model.residual for run in study_of(name).runs}


def test_paper_and_small_ask_the_same():
    for name in ("table2", "table4", "fig6", "fig5_fig8", "fig7"):
        paper, small = kinds_of(name), kinds_of(f"{name}_small")
        assert paper["standard"].kind == small["standard"].kind == "standard"
        for kind in paper.keys() & small.keys():
            assert paper[kind].variations == small[kind].variations
            gated = [one[kind].norm_gate_rank is not None for one in (paper, small)]
            assert gated[0] == gated[1] == kind.endswith("_gated")
        assert set(paper) - set(small) <= {"s32"}  # 16 sublayers have no block of 32
        report = study_of(name).settings.report
        assert report.fit == study_of(f"{name}_small").settings.report.fit


def test_table_4_has_all_rows():
    changed = {key for residual in kinds_of("table4").values() for key in residual.variations}
    of_the_table = {"window", "query", "scores", "normalizer", "key_norm", "num_heads"}
    assert changed == of_the_table | {"values", "block_sum"}
    assert {one.kind for one in kinds_of("table4").values()} == {
        "standard",
        "full",
        "block",
        "dense_former",
        "mhc_lite",
    }


def test_gain_small():
    study = study_of("gain_small")
    config = study.runs[0].config
    assert len(study.runs) == 36 and config.model.num_sublayers == 16
    assert config.train.train_iters * config.train.global_batch_size * config.train.seq_length < 1e6
    assert config.parallel.least_processes == 1


def test_gpu_quarter_hour():
    study = study_of("gpu_quarter_hour")
    config = study.runs[0].config
    model, train = config.model, config.train
    assert len(study.runs) == 9
    assert (model.num_layers, model.hidden_size, train.seq_length) == (16, 512, 512)
    assert count_parameters(model).total == pytest.approx(62e6, rel=0.1)
    tokens = train.train_iters * train.global_batch_size * train.seq_length
    assert tokens > 1.3 * 10e6  # a word of English is some 1.3 tokens
    useful = 9 * tokens * training_flops_per_token(model, train.seq_length)
    assert useful / 989e12 < 0.15 * 9 * 60  # of an H100's peak, in nine minutes


def test_gpu_rates():
    """The runs of the quarter of an hour at several rates, shorter, and less of them in all."""
    rates, after = study_of("gpu_rates"), study_of("gpu_quarter_hour")
    lengths = {run.config.train.train_iters for run in rates.runs}
    assert len(rates.runs) == 12 and len(lengths) == 1
    assert 12 * lengths.pop() < 0.5 * 9 * after.runs[0].config.train.train_iters
    assert rates.settings.report.tune == "lr"
    for ours, theirs in zip(rates.runs[::4], after.runs[:3], strict=True):
        assert ours.labels["kind"] == theirs.labels["kind"]
        assert ours.config.model == theirs.config.model


@pytest.mark.parametrize("size", range(5))
def test_sizes_grow(size):
    """Of table2_small: tokens for each active parameter are about the same at all sizes."""
    runs = [run for run in study_of("table2_small").runs if run.labels["kind"] == "standard"]
    labels = list(dict.fromkeys(run.labels["size"] for run in runs))
    config = next(run.config for run in runs if run.labels["size"] == labels[size])
    model, train = config.model, config.train
    inner = count_parameters(model).active - 2 * model.vocab_size * model.hidden_size
    tokens = train.train_iters * train.global_batch_size * train.seq_length
    assert tokens / inner == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize(
    ("name", "active", "flops", "tolerance"),
    [("fig7", 2.3e8, 6.5e19, 0.08), ("fig7_small", 1.2e6, 7e13, 0.15)],
)
def test_shapes_of_one_size_and_compute(name, active, flops, tolerance):
    runs = [run for run in study_of(name).runs if run.labels["kind"] == "standard"]
    for config in {run.labels["shape"]: run.config for run in runs}.values():
        model, train = config.model, config.train
        inner = count_parameters(model).active - 2 * model.vocab_size * model.hidden_size
        assert inner == pytest.approx(active, rel=tolerance)
        tokens = train.train_iters * train.global_batch_size * train.seq_length
        assert tokens * model_flops_per_token(config) == pytest.approx(flops, rel=0.05)
