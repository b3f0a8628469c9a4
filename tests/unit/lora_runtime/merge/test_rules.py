"""Each rule against loops that spell its formula, against PEFT where it has the same one, and for what it promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.merge_utils import magnitude_prune as peft_magnitude_prune
from peft.utils.merge_utils import task_arithmetic as peft_task_arithmetic
from peft.utils.merge_utils import ties as peft_ties
from torch import Tensor

from lora_runtime.merge import sparsify
from lora_runtime.merge.rules import RULES, Options, elected

SEEDS = st.integers(0, 10**6)
WEIGHTS = st.lists(st.floats(0.1, 2), min_size=3, max_size=3)
DENSITIES = st.floats(0.1, 1)


def deltas(seed: int, count: int = 3, rows: int = 6, columns: int = 7) -> Tensor:
    return torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def apply(name: str, stacked: Tensor, weights: list[float], **options: object) -> Tensor:
    return RULES[name].apply(stacked, torch.tensor(weights, dtype=torch.float64), Options(**options), generator())


def close(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got.double(), want.double(), atol=1e-9, rtol=1e-7)


@given(SEEDS, WEIGHTS, DENSITIES)
def test_what_peft_also_has_is_pefts(seed: int, weights: list[float], density: float):
    stacked, tensor = deltas(seed), torch.tensor(weights, dtype=torch.float64)
    parts = list(stacked)
    assert close(apply("linear", stacked, weights), peft_task_arithmetic(parts, tensor))
    pruned = apply("magnitude_prune", stacked, weights, density=density)
    assert close(pruned, peft_magnitude_prune(parts, tensor, density))
    assert close(apply("ties", stacked, weights, density=density, convention="peft"), peft_ties(parts, tensor, density))


@given(SEEDS, WEIGHTS)
def test_mergekits_election_entry_by_entry(seed: int, weights: list[float]):
    """Signs are elected by what is added, and what agrees is divided by its weights."""
    stacked = deltas(seed) * (torch.rand(3, 6, 7, generator=generator(seed)) < 0.6)
    got = elected(stacked, torch.tensor(weights, dtype=torch.float64), "mergekit")
    for row in range(6):
        for column in range(7):
            values = [(w, w * float(stacked[i, row, column])) for i, w in enumerate(weights)]
            sign = 1 if sum(v for _, v in values) >= 0 else -1
            agreeing = [(w, v) for w, v in values if v * sign > 0]
            want = sum(v for _, v in agreeing) / sum(w for w, _ in agreeing) if agreeing else 0.0
            assert float(got[row, column]) == pytest.approx(want, abs=1e-9)


def test_the_conventions_differ_as_is_known_of_them():
    """Two equal deltas at half weight each: one whole by mergekit's, a half by PEFT's."""
    same = deltas(0, count=1).repeat(2, 1, 1)
    assert close(apply("ties", same, [0.5, 0.5], density=1.0), same[0])
    assert close(apply("ties", same, [0.5, 0.5], density=1.0, convention="peft"), same[0] / 2)


@pytest.mark.parametrize("rule", ["dare_linear", "dare_ties", "della"])
def test_random_rules_repeat_by_seed_and_drop_their_share(rule: str):
    stacked = deltas(1, rows=80, columns=60)
    first, again = (apply(rule, stacked, [1.0, 1.0, 1.0], density=0.3) for _ in range(2))
    assert close(first, again)
    other = RULES[rule].apply(stacked, torch.ones(3, dtype=torch.float64), Options(density=0.3), generator(9))
    assert not close(first, other)
    assert RULES[rule].is_random and not RULES["ties"].is_random


@pytest.mark.parametrize("thin", ["random", "ranked"])
def test_thinning_keeps_its_share_and_the_expectation(thin: str):
    delta, mixed = deltas(2, count=1, rows=40, columns=50)[0], generator(3)

    def draw() -> Tensor:
        if thin == "random":
            return sparsify.random(delta, 0.4, mixed)
        return sparsify.ranked(delta, 0.4, 0.2, mixed)

    draws = torch.stack([draw() for _ in range(800)])
    assert float((draws != 0).double().mean()) == pytest.approx(0.4, abs=0.01)
    error = (draws.mean(0) - delta).abs() / (draws.std(0) / math.sqrt(800)).clamp(min=1e-9)
    assert float((error < 4).double().mean()) > 0.99
    kept = (draws != 0).double().mean(0)
    largest = delta.abs().argsort(dim=1)[:, -1]
    of_largest = kept.gather(1, largest[:, None]).mean()
    assert float(of_largest) == pytest.approx(0.5 if thin == "ranked" else 0.4, abs=0.03)


@given(SEEDS, DENSITIES, st.floats(0, 0.5))
def test_breadcrumbs_leave_out_both_ends(seed: int, density: float, gamma: float):
    delta = deltas(seed, count=1)[0]
    kept = sparsify.without_outliers(delta, density, gamma)
    mask = kept != 0
    assert int(mask.sum()) == int(density * delta.numel())
    dropped = min(int(gamma * delta.numel()), delta.numel() - int(mask.sum()))
    larger = delta.abs()[~mask] > delta.abs()[mask].max() if mask.any() else torch.zeros(1)
    assert int(larger.sum()) == (dropped if mask.any() else 0)


def test_tsv_keeps_each_tasks_own_directions():
    """Tasks of rank 2 in directions of their own come through untouched; in shared ones they are made orthogonal."""
    basis = torch.linalg.qr(deltas(3, count=1, rows=12, columns=12)[0]).Q
    apart = torch.stack([basis[:, 4 * t : 4 * t + 2] @ basis[4 * t : 4 * t + 2] * (t + 1) for t in range(3)])
    assert close(apply("tsv", apart, [1.0, 1.0, 1.0]), apart.sum(0))
    assert close(apply("tsv", apart, [2.0, -1.0, 1.0]), 2 * apart[0] - apart[1] + apart[2])
    values = torch.linalg.svdvals(apply("tsv", deltas(4, rows=12, columns=12), [1.0, 1.0, 1.0]))
    strongest = torch.cat([torch.linalg.svdvals(delta)[:4] for delta in deltas(4, rows=12, columns=12)])
    assert close(values.sort().values, strongest.sort().values)


@given(SEEDS, WEIGHTS)
def test_iso_c_evens_out_and_keeps_the_sum_of_values(seed: int, weights: list[float]):
    stacked = deltas(seed)
    got, plain = apply("iso_c", stacked, weights), apply("linear", stacked, weights)
    values = torch.linalg.svdvals(got)
    assert close(values, torch.linalg.svdvals(plain).mean().expand_as(values))


@given(SEEDS, st.floats(0.05, 0.95))
def test_karcher_of_two_is_slerp(seed: int, share: float):
    first, second = deltas(seed, count=2)
    got = apply("karcher", torch.stack([first, second]), [1 - share, share])
    one, two = first / first.norm(), second / second.norm()
    angle = torch.arccos((one * two).sum())
    mixed = (torch.sin((1 - share) * angle) * one + torch.sin(share * angle) * two) / torch.sin(angle)
    assert close(got, mixed * ((1 - share) * first.norm() + share * second.norm()))


@given(SEEDS, WEIGHTS)
def test_karcher_is_where_the_pulls_cancel(seed: int, weights: list[float]):
    """The condition that defines the mean: Σ wᵢ·log_x(xᵢ) = 0."""
    stacked = deltas(seed)
    mean = apply("karcher", stacked, weights)
    unit = (mean / mean.norm()).flatten()
    pull = torch.zeros_like(unit)
    for delta, weight in zip(stacked, weights, strict=True):
        other = (delta / delta.norm()).flatten()
        cosine = (other @ unit).clamp(-1, 1)
        pull += weight * torch.arccos(cosine) / torch.sqrt(1 - cosine**2) * (other - cosine * unit)
    assert float(pull.norm()) < 1e-6


@given(SEEDS, st.sampled_from(sorted(set(RULES) - {"tsv", "karcher"})), st.floats(0.2, 2))
def test_one_adapter_at_full_density_is_itself(seed: int, rule: str, weight: float):
    one = deltas(seed, count=1)
    got = apply(rule, one, [weight], density=1.0)
    if rule == "iso_c":
        assert close(torch.linalg.svdvals(got).sum(), weight * torch.linalg.svdvals(one[0]).sum())
    elif rule in ("ties", "dare_ties", "della"):
        assert close(got, one[0])
    else:
        assert close(got, weight * one[0])


@pytest.mark.parametrize("rule", sorted(RULES))
def test_nothing_in_nothing_out(rule: str):
    got = apply(rule, torch.zeros(2, 4, 5, dtype=torch.float64), [1.0, 1.0])
    assert got.shape == (4, 5) and not got.any() and torch.isfinite(got).all()
