from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from attnres_train.parallel.machines import by_machine, choose, hand_over

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


def test_machines_of_one_name_are_told_apart():
    assert by_machine(BY_BLOCKS) == {"a": "A", "b": "B"}
    assert by_machine(ONE_NAME) == {"x": "A", "x (rank 2)": "B"}
    assert list(by_machine(IN_TURN)) == ["a", "b"], "that of rank 0 first"


def test_alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ranks = SimpleNamespace(rank=0, world_size=1, control=dist.group.WORLD)
        value, machines = hand_over(["what was prepared"], ranks)
    finally:
        dist.destroy_process_group()
    assert value == ["what was prepared"]
    assert list(machines.values()) == [value]
