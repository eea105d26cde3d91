"""What tensor-parallel ranks cannot share is refused with the arithmetic."""

from __future__ import annotations

import pytest

from tests.config.helpers import says

ADAMW = "optimizer.kind=adamw"
BY = "parallel.tensor_model_parallel_size"
FOUR = (ADAMW, f"{BY}=4")


def test_what_can_be_shared(problems):
    assert problems(*FOUR) == []
    assert problems("model.kda.num_heads=3", "train.seq_length=31") == []  # nobody shares them


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.kda.num_heads=6", "model.kda.num_heads 6 / {} 4 leaves 2 over"),
        ("model.mla.num_heads=3", "model.mla.num_heads 3 / {} 4 leaves 3 over"),
        ("model.intermediate_size=130", "model.intermediate_size 130 / {} 4 leaves 2 over"),
        ("model.vocab_size=4098", "model.vocab_size 4098 / {} 4 leaves 2 over"),
        ("train.seq_length=31", "train.seq_length 31 / {} 4 leaves 3 over"),
    ],
)
def test_what_cannot(problems, override, told):
    key, _, value = override.partition("=")
    value, below = int(value), int(value) // 4 * 4
    near = f"take {f'{below} or ' if below else ''}{below + 4} for {key}, or another {BY}"
    says(problems(*FOUR, override), told.format(BY), near)


def test_the_width_of_all_shared_experts(problems):
    moe = ("model.moe.num_shared_experts=2", "model.moe.intermediate_size=31")
    named = f"model.moe.num_shared_experts 2 x model.moe.intermediate_size 31 = 62 / {BY} 4"
    says(problems(*FOUR, *moe), named, "leaves 2 over", "take 30 or 32 for model.moe.intermediate")
    assert problems(*FOUR, "model.moe.num_shared_experts=0", moe[1]) == []


def test_layers_that_the_model_has_not(problems):
    """Only those are split that there are."""
    everywhere = "model.full_attention_layers=[1, 2, 3, 4]"
    assert problems(*FOUR, everywhere, "model.kda.num_heads=3") == []
    assert problems(*FOUR, "model.moe.first_dense_layers=0", "model.intermediate_size=130") == []


def test_processes(problems):
    sizes = (ADAMW, f"{BY}=2", "parallel.pipeline_model_parallel_size=2")
    arithmetic = f"takes 4 (parallel.pipeline_model_parallel_size 2 x {BY} 2)"
    says(problems(*sizes, world_size=6), arithmetic, "start 4 or 8 processes")
    assert problems(*sizes, world_size=8) == []
