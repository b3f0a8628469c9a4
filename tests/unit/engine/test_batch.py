"""Scheduling: decoding never stalls, prompts fill what is left, everything ends."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from lora_runtime.engine.embedded.batch import Batch


@dataclass(eq=False)
class Item:
    num_prompt_tokens: int
    num_computed: int = 0


def test_a_long_prompt_does_not_stop_decoding():
    batch = Batch(max_tokens=8)
    decoding, long = Item(3, 3), Item(100)
    batch.join(decoding)
    batch.join(long)
    plan = batch.schedule()
    assert plan.decode == (decoding,)
    assert [(span.start, span.stop) for span in plan.prefill] == [(0, 7)]
    assert batch.advance(plan) == [decoding]
    assert (decoding.num_computed, long.num_computed) == (4, 7)


def test_prompts_are_served_first_come_first():
    batch = Batch(max_tokens=10)
    first, second = Item(6), Item(6)
    batch.join(first)
    batch.join(second)
    plan = batch.schedule()
    assert [(span.sequence, span.stop) for span in plan.prefill] == [(first, 6), (second, 4)]
    assert batch.advance(plan) == [first]


def test_nothing_to_do():
    assert Batch(max_tokens=4).schedule().is_empty


@given(
    prompts=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6)), min_size=1, max_size=12),
    max_tokens=st.integers(12, 64),
)
def test_every_sequence_ends_within_bounds(prompts, max_tokens):
    batch = Batch(max_tokens=max_tokens)
    left = {}
    for length, count in prompts:
        item = Item(length)
        batch.join(item)
        left[item] = count
    for _ in range(1000):
        plan = batch.schedule()
        if plan.is_empty:
            break
        used = len(plan.decode) + sum(span.stop - span.start for span in plan.prefill)
        assert used <= max_tokens
        for item in batch.advance(plan):
            assert item.num_computed >= item.num_prompt_tokens
            left[item] -= 1
            if left[item] == 0:
                batch.leave(item)
    assert not batch.running
    assert set(left.values()) == {0}
