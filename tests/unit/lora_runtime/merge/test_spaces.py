"""The core is the deltas, whatever their ranks and factors are; truncation keeps what it says it keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_runtime.merge.spaces import Factors, core_of, truncated

RANKS = st.lists(st.integers(1, 8), min_size=1, max_size=4)
SIDES = st.integers(3, 40)


def members(ranks: list[int], rows: int, columns: int, seed: int) -> list[Factors]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator))
        for rank in ranks
    ]


def dense(factors: Factors) -> torch.Tensor:
    return factors[0].double() @ factors[1].double()


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((got.double() - want.double()).norm() <= tolerance * max(float(want.double().norm()), 1e-12))


@given(RANKS, SIDES, SIDES, st.integers(0, 10**6))
def test_the_core_loses_nothing(ranks: list[int], rows: int, columns: int, seed: int):
    """Also where the ranks together are more than the matrix has rows."""
    given_ = members(ranks, rows, columns, seed)
    core = core_of(given_)
    for factors, small in zip(given_, core.cores_TPQ, strict=True):
        assert close(core.left_MP.double() @ small @ core.right_NQ.double().T, dense(factors))
    for basis in (core.left_MP, core.right_NQ):
        assert close(basis.T @ basis, torch.eye(basis.shape[1]))


@given(RANKS, SIDES, SIDES, st.integers(0, 10**6), st.lists(st.floats(-3, 3), min_size=4, max_size=4))
def test_a_sum_at_full_rank_is_the_dense_sum(
    ranks: list[int], rows: int, columns: int, seed: int, weights: list[float]
):
    given_ = members(ranks, rows, columns, seed)
    core = core_of(given_)
    merged = sum(w * small for w, small in zip(weights, core.cores_TPQ, strict=False))
    found, energy = core.factors(torch.as_tensor(merged))
    want = sum(w * dense(factors) for w, factors in zip(weights, given_, strict=False))
    scale = sum(abs(w) * float(dense(factors).norm()) for w, factors in zip(weights, given_, strict=False))
    assert float((dense(found) - want).norm()) <= 1e-5 * max(scale, 1e-9)
    assert energy == pytest.approx(1.0)
    assert found[0].shape[1] <= min(sum(ranks), rows, columns)


@given(st.integers(0, 10**6), st.integers(1, 12))
def test_truncation_is_the_best_there_is(seed: int, rank: int):
    given_ = members([4, 6], 30, 20, seed)
    core = core_of(given_)
    merged = 0.7 * core.cores_TPQ[0] - 0.3 * core.cores_TPQ[1]
    want = 0.7 * dense(given_[0]) - 0.3 * dense(given_[1])
    found, energy = core.factors(merged, rank)
    of_dense, dense_energy = truncated(want, rank)
    s = torch.linalg.svdvals(want)
    kept = min(rank, 10)
    assert found[0].shape == (30, kept) and found[1].shape == (kept, 20)
    assert energy == pytest.approx(float((s[:kept] ** 2).sum() / (s**2).sum()), abs=1e-6)
    assert dense_energy == pytest.approx(energy, abs=1e-5)
    assert float((dense(found) - want).norm()) == pytest.approx(float((dense(of_dense) - want).norm()), abs=1e-3)


def test_the_core_does_not_depend_on_the_factors():
    """B·c and A/c, or any turn between the two, are the same delta: the same core but for signs."""
    generator = torch.Generator().manual_seed(0)
    given_ = members([4, 3], 20, 15, 1)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    (b, a), other = given_
    again = [other, (100 * b @ turn, turn.T @ a / 100)]
    one, two = core_of(given_), core_of(again)
    assert close(one.cores_TPQ[0].abs(), two.cores_TPQ[1].abs(), 1e-3)
    assert close(one.cores_TPQ[1].abs(), two.cores_TPQ[0].abs(), 1e-3)


def test_nothing_merges_to_nothing():
    nothing = (torch.zeros(6, 2), torch.zeros(2, 5))
    core = core_of([nothing, nothing])
    found, energy = core.factors(core.cores_TPQ.sum(0))
    assert energy == 1.0 and not dense(found).any() and found[0].shape[1] == 1
