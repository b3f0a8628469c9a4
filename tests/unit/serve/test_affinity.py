"""Where requests go: to who holds their adapters, unless that one has too much to do."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from serve.affinity import LOAD_COST, Candidate, ranked

VERSIONS = st.frozensets(st.sampled_from("abcdef"), max_size=4)
CANDIDATES = st.lists(
    st.builds(lambda held, load: (held, load), VERSIONS, st.integers(0, 30)), min_size=1, max_size=8
).map(lambda rows: [Candidate(id=f"r{i}", held=held, load=load) for i, (held, load) in enumerate(rows)])


def first(wanted: set[str], *replicas: tuple[set[str], int]) -> int:
    candidates = [Candidate(id=f"r{i}", held=held, load=load) for i, (held, load) in enumerate(replicas)]
    return int(ranked(wanted, candidates)[0].id[1:])


@given(VERSIONS, CANDIDATES)
def test_every_replica_is_ranked_once(wanted, candidates):
    assert sorted(c.id for c in ranked(wanted, candidates)) == sorted(c.id for c in candidates)


def test_who_holds_it_is_asked():
    assert first({"a"}, (set(), 0), ({"a"}, 3)) == 1
    assert first({"a", "b"}, ({"a"}, 0), ({"a", "b"}, 0), ({"b"}, 0)) == 1
    assert first({"a", "b"}, ({"a"}, 0), (set(), 0)) == 0


def test_a_hot_adapter_spills_to_who_has_less_to_do_and_both_share_it_then():
    assert first({"a"}, ({"a"}, 30), (set(), 0)) == 1
    assert first({"a"}, ({"a"}, 30), ({"a"}, 29)) == 1


def test_base_requests_go_to_the_shortest_queue():
    assert first(set(), ({"a"}, 3), (set(), 1), ({"b"}, 2)) == 1


@given(VERSIONS, CANDIDATES)
def test_nobody_waits_behind_more_than_a_load_is_worth(wanted, candidates):
    chosen = ranked(wanted, candidates)[0]
    idle = min(candidate.load for candidate in candidates)
    missing_less = len(wanted - min(candidates, key=lambda c: (c.load, c.id)).held)
    assert chosen.load - idle <= missing_less * (LOAD_COST + 2.0)


@given(st.frozensets(st.sampled_from("abcdef"), min_size=1))
def test_routers_agree_on_what_nobody_holds_whatever_order_they_see(wanted):
    candidates = [Candidate(id=f"r{i}", held=frozenset(), load=0) for i in range(5)]
    assert ranked(wanted, candidates) == ranked(wanted, candidates[::-1])


def test_cold_adapters_spread_evenly_and_few_move_when_a_replica_leaves():
    candidates = [Candidate(id=f"r{i}", held=frozenset(), load=0) for i in range(4)]
    before = {v: ranked({v}, candidates)[0].id for v in map(str, range(2000))}
    shares = Counter(before.values())
    assert min(shares.values()) > 420 and max(shares.values()) < 580
    after = {v: ranked({v}, candidates[:3])[0].id for v in before}
    assert all(after[v] == home for v, home in before.items() if home != "r3")
