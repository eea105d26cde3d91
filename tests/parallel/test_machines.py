from __future__ import annotations

import pytest

from attnres_train.parallel.machines import Place, choose, first_ranks, machine_names

BY_BLOCKS = [("a", "A"), ("a", None), ("b", "B"), ("b", None)]
IN_TURN = [("a", "A"), ("b", "B"), ("a", None), ("b", None)]
ONE_NAME = [("x", "A"), ("x", None), ("x", "B"), ("x", None)]


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (BY_BLOCKS, "AABB"),
        (IN_TURN, "ABAB"),
        (ONE_NAME, "AABB"),
        ([("a", None), ("a", "A"), ("b", "B")], "AAB"),
        ([("a", "A"), ("a", "B"), ("a", "C")], "ABC"),
        ([("a", "A"), ("?", None), ("b", "B")], "AAB"),
    ],
    ids=["blocks", "in turn", "one name", "second first", "all prepare", "nameless"],
)
def test_each_rank_takes_what_its_machine_has(told, expected):
    assert [choose(told, rank) for rank in range(len(told))] == list(expected)


def places(told):
    """The first rank of a machine is the one that has a value."""
    return [Place(name, 0 if value else 1) for name, value in told]


def test_each_rank_knows_the_first_of_its_machine():
    assert first_ranks(places(BY_BLOCKS)) == [0, 0, 2, 2]
    assert first_ranks(places(IN_TURN)) == [0, 1, 0, 1]
    assert first_ranks(places(ONE_NAME)) == [0, 0, 2, 2]
    assert first_ranks([Place("a", 1)] * 3) == [0, 0, 0], "none has said that it is the first"


def test_machines_of_one_name_are_told_apart():
    assert machine_names(places(BY_BLOCKS)) == ["a", "a", "b", "b"]
    assert machine_names(places(IN_TURN)) == ["a", "b", "a", "b"]
    assert machine_names(places(ONE_NAME)) == ["x", "x", "x (rank 2)", "x (rank 2)"]
