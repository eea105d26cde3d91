from __future__ import annotations

import pytest

from attnres_train.config import describe, load_config
from attnres_train.planning.build import chunk_layers


def lines(path, *overrides: str, world_size: int | None = None) -> dict[str, str]:
    config = load_config(path, overrides)
    text = describe(config, chunk_layers(config), world_size)
    return {
        name.strip(): rest for name, _, rest in (line.partition("  ") for line in text.split("\n"))
    }


def line(path, name: str, *overrides: str, world_size: int | None = None) -> str:
    return lines(path, *overrides, world_size=world_size)[name].strip()


def test_model(small_file):
    assert line(small_file, "model") == (
        "4 layers x 2 = 8 sublayers: attention 3 KDA + 1 MLA, MLP 1 dense + 3 MoE"
    )


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["model.residual.kind=standard"], "standard: one running sum"),
        (["model.residual.kind=full"], "full: 8 sublayers / 1 per block = 8 blocks, "),
        (["model.residual.block_size=3"], "8 sublayers / 3 per block = 3 blocks, + embedding = 4"),
        (["model.residual.window=8"], "+ embedding = 3 sources; window 8"),
        (["model.residual.key_norm=false", "model.residual.num_heads=4"], "; key_norm false; num_"),
        (
            ["model.residual.kind=dense_former"],
            "dense_former: 8 sublayers / 2 per block = 4 blocks",
        ),
        (["model.residual.kind=mhc_lite"], "mhc_lite: 4 streams of 64"),
        (["model.residual.block_sum=unit_outputs"], "; block_sum unit_outputs"),
        (
            ["model.residual.kind=standard", "model.residual.norm_gate_rank=16"],
            "standard: one running sum; norm_gate_rank 16",
        ),
    ],
)
def test_residual(small_file, overrides, text):
    assert text in line(small_file, "residual", *overrides)


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ([], "1 rank x 1 virtual stage = 1 chunk of 4 layers"),
        (
            ["parallel.pipeline_model_parallel_size=3"],
            "3 chunks of 2, 1 (x 2) layer",
        ),
        (
            ["parallel.pipeline_model_parallel_size=2", "parallel.layout=[3, 1]"],
            "2 ranks x 1 virtual stage = 2 chunks of 3, 1 layer",
        ),
        (
            ["parallel.pipeline_model_parallel_size=2", "parallel.layout=Et|t*3L"],
            "2 chunks of 1, 3 layers",
        ),
        (
            # The head costs more than any two layers of this size.
            [
                "parallel.pipeline_model_parallel_size=2",
                "parallel.layout=auto",
                "model.vocab_size=1000000",
            ],
            "2 chunks of 3, 1 layer",
        ),
    ],
)
def test_pipeline(small_file, overrides, text):
    assert line(small_file, "pipeline", *overrides).endswith(text)


@pytest.mark.parametrize("kind", ["standard", "full"])
def test_a_block_size_that_the_kind_does_not_read(small_file, kind):
    """Files that differ in the kind alone share one: it is told, and no error."""
    found = line(
        small_file, "residual", f"model.residual.kind={kind}", "model.residual.block_size=4"
    )
    assert found.endswith("; block_size 4 is not read")
    assert "not read" not in line(small_file, "residual", f"model.residual.kind={kind}")
    assert "not read" not in line(small_file, "residual", "model.residual.block_size=4")


def test_batch(small_file):
    overrides = ("parallel.pipeline_model_parallel_size=2", "train.micro_batch_size=2")
    found = lines(small_file, *overrides, world_size=4)
    assert found["processes"].strip() == "4 / 2 per replica = 2 data-parallel replicas"
    assert "8 samples / (2 per micro-batch x 2 replicas) = 2 per step" in found["micro-batches"]
    assert found["tokens"].strip() == "8 samples x 32 = 256 per step, x 100 steps = 25,600"
    alone = lines(small_file, *overrides)
    assert "x 1 replica) = 4 per step" in alone["micro-batches"]
    assert "experts" not in alone


def test_shared_experts(small_file):
    found = lines(small_file, "parallel.expert_model_parallel_size=4")
    assert found["experts"].strip() == "256 / 4 ranks = 64 per rank and layer"
    assert found["processes"].strip() == "4 / 1 per replica = 4 data-parallel replicas"


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["lr_schedule.kind=constant"], "0.001 from step 1"),
        (["lr_schedule.warmup_iters=10"], "0.001 from step 10, cosine to 0.0001 at step 100"),
        (["lr_schedule.kind=wsd"], "0.001 from step 1, linear from step 80 to 0.0001 at step 100"),
        (["lr_schedule.decay_end_iter=60"], "0.001 from step 1, cosine to 0.0001 at step 60"),
        (
            ["lr_schedule.kind=wsd", "lr_schedule.wsd_decay_iters=5"],
            "0.001 from step 1, linear from step 95 to 0.0001 at step 100",
        ),
        (
            ["lr_schedule.kind=wsd", "lr_schedule.wsd_decay_iters=500"],
            "0.001 from step 1, linear from step 0 to 0.0001 at step 100 (not over "
            "wsd_decay_iters 500: the run is shorter)",
        ),
        (["lr_schedule.warmup_iters=400"], "0.00025 at the last step, still warming up to 0.001"),
    ],
)
def test_learning_rate(small_file, overrides, text):
    assert line(small_file, "learning rate", *overrides) == text


def test_optimizer(small_file):
    found = line(small_file, "optimizer", "optimizer.kind=adamw", "optimizer.weight_decay=0.2")
    told = "adamw: AdamW for every parameter; weight decay 0.2, betas 0.9 and 0.95"
    assert found == told
