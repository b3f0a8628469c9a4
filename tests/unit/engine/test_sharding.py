"""What tensor-parallel workers hold of an adapter adds up to the adapter."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_runtime.engine.vllm.sharding import WHOLE, Shard, evenly, heads
from lora_runtime.weights import LoraFactors, SavedModule, TokenRows

WORKERS = st.sampled_from([1, 2, 4, 8])
SEEDS = st.integers(0, 1 << 16)


def factors(seed: int, out: int, inner: int, rank: int = 3) -> LoraFactors:
    made = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, inner, generator=made), torch.randn(out, rank, generator=made)
    return LoraFactors(a=a, b=b, scaling=0.5, bias=torch.randn(out, generator=made))


@given(WORKERS, SEEDS)
def test_rows_of_a_delta_follow_one_another(workers: int, seed: int) -> None:
    whole = factors(seed, 16, 5)
    shards = [Shard(rows=(evenly(16, rank, workers),)) for rank in range(workers)]
    held = [shard.lora(whole) for shard in shards]
    torch.testing.assert_close(torch.cat([part.delta() for part in held]), whole.delta())
    assert torch.equal(torch.cat([part.bias for part in held]), whole.bias)
    assert sum(shard.width(16) for shard in shards) == 16


@given(WORKERS, SEEDS)
def test_products_of_columns_add_up_and_one_worker_adds_the_bias(workers: int, seed: int) -> None:
    whole = factors(seed, 6, 16)
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed + 1))
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed + 2))
    saved = SavedModule(parameters={"weight": weight, "bias": whole.bias})
    total, bias = torch.zeros(4, 6), []
    for rank in range(workers):
        start, stop = evenly(16, rank, workers)
        shard = Shard(columns=(start, stop), has_bias=rank == 0)
        low, full = shard.lora(whole), shard.saved(saved)
        total += x[:, start:stop] @ (low.delta() + full.parameters["weight"]).T
        bias += [found for found in (low.bias, full.parameters.get("bias")) if found is not None]
    torch.testing.assert_close(total, x @ (whole.delta() + weight).T, atol=1e-5, rtol=1e-4)
    assert len(bias) == 2
    only = Shard(columns=(0, 8), has_bias=False).saved(SavedModule(parameters={"bias": whole.bias}))
    assert only is None


@given(st.sampled_from([(8, 2), (8, 4), (8, 8), (4, 1)]), WORKERS)
def test_workers_share_heads_of_keys_beyond_their_number(counts: tuple[int, int], workers: int) -> None:
    """What vLLM's QKVParallelLinear does: each worker's query heads find their own keys there."""
    query, key = counts
    if workers > query:
        return
    for rank in range(workers):
        q_start, q_stop = heads(query, 4, rank, workers)
        k_start, k_stop = heads(key, 4, rank, workers)
        wanted = {head * key // query for head in range(q_start // 4, q_stop // 4)}
        assert wanted == set(range(k_start // 4, k_stop // 4))


@given(WORKERS, SEEDS)
def test_a_vocabulary_is_cut_with_its_padding_left_out(workers: int, seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    size, padded = 30, 32
    spans = [(min(s, size), min(e, size)) for s, e in (evenly(padded, rank, workers) for rank in range(workers))]
    low = LoraFactors(
        a=torch.randn(2, size, generator=made), b=torch.randn(7, 2, generator=made), scaling=2.0, kind="embedding"
    )
    deltas = [Shard(rows=(span,)).lora(low).delta() for span in spans]
    torch.testing.assert_close(torch.cat(deltas), low.delta())
    indices = torch.tensor([29, 3, 17, 8])
    rows = TokenRows(indices=indices, rows=torch.randn(4, 7, generator=made))
    table = torch.zeros(size, 7)
    for start, stop in spans:
        if (held := Shard(rows=((start, stop),)).token_rows(rows)) is not None:
            table[held.indices + start] = held.rows
    want = torch.zeros(size, 7)
    want[indices] = rows.rows
    assert torch.equal(table, want)


def test_a_packed_leaf_keeps_its_own_heads_of_each_part() -> None:
    whole = factors(0, 12, 5)
    shard = Shard(rows=((2, 4), (6, 8), (10, 12)))
    torch.testing.assert_close(shard.lora(whole).delta(), whole.delta()[[2, 3, 6, 7, 10, 11]])
    assert shard.width(12) == 6


def test_a_whole_leaf_is_left_as_it_is() -> None:
    whole = factors(1, 4, 4)
    assert torch.equal(WHOLE.lora(whole).delta(), whole.delta())
    assert WHOLE.token_rows(TokenRows(indices=torch.tensor([1]), rows=torch.ones(1, 4))) is not None
