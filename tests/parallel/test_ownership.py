"""Every matrix and every row has one owner, and the shares are even."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from attnres_train.parallel.ownership import Update, most_state_bytes, share_out, state_bytes

UPDATES = st.lists(
    st.builds(
        lambda matrices, work, size: Update(matrices, float(work * matrices), size * matrices),
        st.integers(1, 9),
        st.sampled_from([0, 0, 3, 100]),
        st.integers(1, 1000),
    ),
    max_size=30,
).map(lambda updates: [(f"p{i}", update) for i, update in enumerate(updates)])


@given(UPDATES, st.integers(1, 8))
def test_each_matrix_has_one_owner_and_those_of_one_lie_together(updates, replicas):
    shares = share_out(updates, replicas)
    owned = Counter((s.name, m) for s in shares for m in range(s.first, s.stop))
    assert owned == {(name, m): 1 for name, u in updates for m in range(u.parts)}
    assert len({(s.name, s.owner) for s in shares}) == len(shares)
    assert all(0 <= share.owner < replicas for share in shares)
    assert [s.name for s in shares] == sorted((s.name for s in shares), key=lambda n: int(n[1:]))
    assert sum(state_bytes(updates, replicas)) == sum(update.state_bytes for _, update in updates)


@given(UPDATES, st.integers(1, 8))
def test_shares_differ_by_one_matrix_at_most(updates, replicas):
    work = [0.0] * replicas
    costs = dict(updates)
    for share in share_out(updates, replicas):
        work[share.owner] += costs[share.name].work / share.of * (share.stop - share.first)
    largest = max((update.work / update.parts for _, update in updates), default=0.0)
    assert max(work) - min(work) <= largest + 1e-9


def test_what_has_no_work_evens_out_the_state():
    updates = [("stack", Update(3, 30.0, 300)), ("a", Update(1, 0.0, 60)), ("b", Update(1, 0, 40))]
    assert sorted(state_bytes(updates, 2)) == [200, 200]
    assert [share.stop - share.first for share in share_out(updates, 2) if share.name == "stack"]


@given(UPDATES, st.integers(1, 8), st.integers(40, 400))
def test_a_table_fills_up_the_state_to_one_level(updates, replicas, rows):
    """It alone is more than all the rest, so nobody is above the level without it."""
    rest = sum(update.state_bytes for _, update in updates)
    row = rest + 8
    held = state_bytes([*updates, ("table", Update(rows, 0.0, row * rows))], replicas)
    assert max(held) - min(held) <= row


def test_state_falls_as_one_over_the_replicas():
    """Two tables of a quarter of the state each, beside matrices that differ in work and state."""
    matrices = [(f"m{i}", Update(1, float(10 + i % 3), 1000 + 10 * (i % 5))) for i in range(64)]
    norms = [(f"n{i}", Update(16, 0.0, 16)) for i in range(20)]
    tables = [(f"t{i}", Update(4096, 0.0, 8 * 4096)) for i in range(2)]
    updates = [*matrices, *tables, *norms]
    total = sum(update.state_bytes for _, update in updates)
    for replicas in (1, 2, 4, 8, 16, 32, 64):
        assert most_state_bytes([u for _, u in updates], replicas) * replicas <= 1.06 * total
    shares = share_out(updates, 64)
    assert all(share.is_whole for share in shares if share.name[0] == "n")  # not worth cutting


def test_a_table_whose_rows_must_not_be_parted_is_a_floor():
    updates = [Update(1, 0.0, 4096), *(Update(1, 1.0, 64) for _ in range(64))]
    assert most_state_bytes(updates, 64) >= 4096
    cut = [Update(512, 0.0, 4096), *updates[1:]]
    assert most_state_bytes(cut, 64) == 64 + 64


def test_one_replica_owns_all_of_everything():
    updates = [("stack", Update(4, 1.0, 8)), ("norm", Update(1, 0.0, 2))]
    assert [share.is_whole for share in share_out(updates, 1)] == [True, True]
