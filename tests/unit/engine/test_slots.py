"""Residency: least recently used out first, never under a lease, all or nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_runtime.engine.slots import Lease, SlotTable
from lora_runtime.errors import InvalidCombination


def test_the_least_recently_used_leaves_first():
    table = SlotTable(2)
    for version in ("a", "b", "a"):
        table.release(table.acquire([version]))
    lease = table.acquire(["c"])
    assert lease.moves[0].evicted == "b"
    assert table.resident == ("a", "c")


def test_a_held_version_is_never_evicted():
    table = SlotTable(2)
    held = table.acquire(["a"])
    table.release(table.acquire(["b"]))
    assert table.acquire(["c"]).moves[0].evicted == "b"
    assert table.acquire(["d"]) is None
    table.release(held)
    assert table.acquire(["d"]).moves[0].evicted == "a"


def test_all_members_or_none():
    table = SlotTable(3)
    table.acquire(["a"])
    table.acquire(["b"])
    before = table.resident
    assert table.acquire(["c", "d"]) is None
    assert table.resident == before
    assert table.acquire(["a", "c"]) is not None


def test_a_set_that_never_fits_is_refused_at_once():
    table = SlotTable(2)
    with pytest.raises(InvalidCombination, match="3 adapters"):
        table.check_fits(["a", "b", "c"])
    table.acquire(["p"])
    table.pin("p")
    with pytest.raises(InvalidCombination):
        table.check_fits(["a", "b"])
    table.check_fits(["a", "p"])


def test_a_pinned_version_stays():
    table = SlotTable(1)
    table.release(table.acquire(["a"]))
    table.pin("a")
    assert table.acquire(["b"]) is None
    table.unpin("a")
    assert table.acquire(["b"]) is not None
    with pytest.raises(KeyError):
        table.pin("nowhere")
    table.unpin("nowhere")


def test_abandoning_forgets_what_was_brought_in():
    table = SlotTable(2)
    kept = table.acquire(["a"])
    lease = table.acquire(["a", "b"])
    table.abandon(lease)
    assert table.resident == ("a",)
    table.release(kept)
    assert table.num_held == 0


def test_releasing_twice_is_a_fault():
    table = SlotTable(1)
    lease = table.acquire(["a"])
    table.release(lease)
    with pytest.raises(RuntimeError):
        table.release(lease)


@settings(max_examples=200)
@given(
    capacity=st.integers(1, 4),
    actions=st.lists(st.one_of(st.sets(st.sampled_from("abcdef"), max_size=4), st.integers(0, 5)), max_size=60),
)
def test_invariants_hold_under_any_order_of_calls(capacity, actions):
    table, leases = SlotTable(capacity), []
    for action in actions:
        if isinstance(action, int):
            if leases:
                table.release(leases.pop(action % len(leases)))
        elif isinstance(lease := table.acquire(action), Lease):
            leases.append(lease)
        held = {version: slot for lease in leases for version, slot in lease.slots.items()}
        assert set(held) <= set(table.resident)
        assert len(set(held.values())) == len(held)
        assert len(table.resident) <= capacity
        assert table.num_held == len(held)
    for lease in leases:
        table.release(lease)
    assert table.num_held == 0
