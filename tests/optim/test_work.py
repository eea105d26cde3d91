"""What updates cost, for sharing them out."""

from __future__ import annotations

from attnres_train.config.schema import OptimizerConfig
from attnres_train.model.parameters import ParameterRule, constant
from attnres_train.optim.kinds import AdamWKind, MuonKind

MATRIX = ParameterRule(constant(0.0), is_matrix=True)
TABLE = ParameterRule(constant(0.0))


def test_muons_work_is_the_products_of_newton_schulz():
    kind = MuonKind(OptimizerConfig(ns_steps=3), "optimizer")
    part = kind.part("w", (4, 10), MATRIX)
    products = 2 * 4 * 10 * 4 + 2 * 4 * 4 * 4 + 2 * 4 * 4 * 10  # X X^T, S S, S X
    assert kind.work(part, (4, 10)) == kind.work(part, (10, 4)) == 3 * products
    assert kind.work(part, (7, 10, 4)) == 7 * 3 * products
    assert kind.work(kind.part("w", (4, 10), TABLE), (4, 10)) == 0


def test_adamw_has_none_beside_its_memory():
    kind = AdamWKind(OptimizerConfig(), "optimizer")
    assert kind.work(kind.part("w", (4, 10), MATRIX), (4, 10)) == 0


def test_head_by_head_the_matrices_are_smaller():
    rule = ParameterRule(constant(0.0), is_matrix=True, heads=5)
    kind = MuonKind(OptimizerConfig(ns_steps=1, per_head=True), "optimizer")
    part = kind.part("w", (20, 10), rule)
    assert kind.work(part, (20, 10)) == 5 * kind.work(kind.part("w", (4, 10), MATRIX), (4, 10))
