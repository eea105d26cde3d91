from __future__ import annotations

from attnres_train.config.schema import ParallelConfig
from attnres_train.parallel.table import rank_table


def parallel(stages: int, tensor: int = 1, experts: int = 1) -> ParallelConfig:
    return ParallelConfig(
        pipeline_model_parallel_size=stages,
        tensor_model_parallel_size=tensor,
        expert_model_parallel_size=experts,
    )


def test_every_rank_and_only_groups_of_several():
    assert rank_table(parallel(2, 2, 4), 8).splitlines() == [
        "rank  stage  replica  tensor  experts",
        "   0      0        0       0        0",
        "   1      0        0       1        1",
        "   2      0        1       0        2",
        "   3      0        1       1        3",
        "   4      1        0       0        0",
        "   5      1        0       1        1",
        "   6      1        1       0        2",
        "   7      1        1       1        3",
    ]
    assert rank_table(parallel(2), 2) == "rank  stage\n   0      0\n   1      1"


def test_of_many_the_first_and_the_rule():
    lines = rank_table(parallel(4, 8), 64).splitlines()
    assert len(lines) == 1 + 16 + 1 and lines[-2].split() == ["15", "0", "1", "7"]
    assert lines[-1].startswith("and 48 more: tensor varies fastest")


def test_nothing_of_a_process_alone():
    assert rank_table(parallel(1), 1) == ""
