from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnres_train.pipeline.plan.schedule import (
    Action,
    forward_only,
    gpipe,
    one_f_one_b,
    peak_in_flight,
)

sizes = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 14))


def brief(actions) -> str:
    return " ".join(f"{action.kind}{action.chunk}.{action.micro_batch}" for action in actions)


def test_plain_1f1b():
    first, second = one_f_one_b(2, 1, 3)
    assert brief(first) == "F0.0 F0.1 B0.0 F0.2 B0.1 B0.2"
    assert brief(second) == "F1.0 B1.0 F1.1 B1.1 F1.2 B1.2"


def test_interleaved_1f1b():
    first, second = one_f_one_b(2, 2, 2)
    assert brief(first) == "F0.0 F0.1 F2.0 F2.1 B2.0 B2.1 B0.0 B0.1"
    assert brief(second) == "F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 B1.0 B1.1"


@given(sizes)
def test_every_rank_runs_each_of_its_passes_once(size):
    ranks, virtual, micro_batches = size
    for schedule in (one_f_one_b(*size), gpipe(*size)):
        for rank, actions in enumerate(schedule):
            assert sorted(actions) == sorted(
                Action(kind, chunk, micro_batch)
                for kind in "FB"
                for chunk in range(rank, ranks * virtual, ranks)
                for micro_batch in range(micro_batches)
            )


@given(sizes)
def test_forward_only_is_the_forward_order_of_1f1b(size):
    for forward, both in zip(forward_only(*size), one_f_one_b(*size), strict=True):
        assert list(forward) == [action for action in both if action.kind == "F"]


@pytest.mark.parametrize(("ranks", "virtual", "groups"), [(4, 1, 3), (4, 2, 3), (3, 4, 2)])
def test_warm_up_depths_of_megatron(ranks, virtual, groups):
    for rank, actions in enumerate(one_f_one_b(ranks, virtual, groups * ranks)):
        ahead = ranks - rank - 1
        expected = ahead if virtual == 1 else 2 * ahead + (virtual - 1) * ranks
        first_backward = next(i for i, action in enumerate(actions) if action.kind == "B")
        assert first_backward == expected + 1  # the steady phase starts with a forward pass
        cool_down = next(i for i, action in enumerate(reversed(actions)) if action.kind == "F")
        assert cool_down == expected + 1


def test_gpipe_runs_all_forward_passes_first():
    first, _ = gpipe(2, 2, 2)
    assert brief(first) == "F0.0 F0.1 F2.0 F2.1 B2.0 B2.1 B0.0 B0.1"
    for actions in gpipe(3, 2, 7):
        assert "".join(action.kind for action in actions) == "F" * 14 + "B" * 14


def test_activations_in_flight():
    """1F1B keeps the micro-batches of its warm-up and one more, GPipe all of them."""
    assert [peak_in_flight(actions, [2.0] * 4) for actions in one_f_one_b(4, 1, 8)] == [8, 6, 4, 2]
    assert [peak_in_flight(actions, [2.0] * 4) for actions in gpipe(4, 1, 8)] == [16] * 4
    assert peak_in_flight(one_f_one_b(2, 2, 2)[1], [0, 1, 0, 10]) == 12
