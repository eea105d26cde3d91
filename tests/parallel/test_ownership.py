"""Every matrix has one owner, and the shares are even."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from attnres_train.parallel.ownership import Update, share_out, state_bytes

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
    assert owned == {(name, m): 1 for name, u in updates for m in range(u.matrices)}
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
    largest = max((update.work / update.matrices for _, update in updates), default=0.0)
    assert max(work) - min(work) <= largest + 1e-9


def test_what_has_no_work_evens_out_the_state():
    updates = [("stack", Update(3, 30.0, 300)), ("a", Update(1, 0.0, 60)), ("b", Update(1, 0, 40))]
    assert sorted(state_bytes(updates, 2)) == [200, 200]
    assert [share.stop - share.first for share in share_out(updates, 2) if share.name == "stack"]


def test_one_replica_owns_all_of_everything():
    updates = [("stack", Update(4, 1.0, 8)), ("norm", Update(1, 0.0, 2))]
    assert [share.is_whole for share in share_out(updates, 1)] == [True, True]
