"""Each rule against loops that spell its formula, against PEFT where it has the same one, and for what it promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import merge_utils as peft
from torch import Tensor

from lora_runtime.merge import sparsify
from lora_runtime.merge.rules import RULES, Options, elected

SEEDS = st.integers(0, 10**6)
WEIGHTS = st.lists(st.floats(0.1, 2), min_size=3, max_size=3)
SIGNED = st.lists(st.floats(-2, 2).filter(lambda weight: abs(weight) > 1e-3), min_size=3, max_size=3)
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
    assert close(apply("linear", stacked, weights), peft.task_arithmetic(parts, tensor))
    pruned = apply("magnitude_prune", stacked, weights, density=density)
    assert close(pruned, peft.magnitude_prune(parts, tensor, density))
    assert close(apply("ties", stacked, weights, density=density, convention="peft"), peft.ties(parts, tensor, density))


@pytest.mark.parametrize("rule", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
def test_dare_is_pefts_but_for_what_is_drawn(rule: str, density: float, monkeypatch: pytest.MonkeyPatch):
    """PEFT draws from the global generator; given our draws, its results are ours."""
    stacked, weights = deltas(5), [0.5, -0.7, 1.2]
    got = apply(rule, stacked, weights, density=density, convention="peft")
    drawn = generator()

    def pruned(tensor: Tensor, density: float, rescale: bool) -> Tensor:
        assert rescale
        return sparsify.random(tensor, density, drawn)

    monkeypatch.setattr(peft, "random_pruning", pruned)
    assert close(got, getattr(peft, rule)(list(stacked), torch.tensor(weights, dtype=torch.float64), density))


@given(SEEDS, st.floats(0.1, 0.95))
def test_what_dare_keeps_is_rescaled_as_pefts(seed: int, density: float):
    """By the density. mergekit's would be by the L1 norm, another number for each draw."""
    delta = deltas(seed, count=1)[0]
    torch.manual_seed(seed)
    for thinned in (sparsify.random(delta, density, generator(seed)), peft.random_pruning(delta, density, True)):
        kept = thinned != 0
        assert close(thinned[kept], delta[kept] / density)


@given(SEEDS, SIGNED, DENSITIES)
def test_ties_entry_by_entry(seed: int, weights: list[float], density: float):
    """Keep each delta's largest entries, weigh, elect signs by the weighted sum, add what agrees and divide it by the
    sizes of its weights. Where all are positive, that is mergekit's."""
    stacked = deltas(seed)
    trimmed = []
    for delta in stacked.tolist():
        sizes = sorted((abs(value) for row in delta for value in row), reverse=True)
        kept = int(density * len(sizes))
        least = sizes[kept - 1] if kept else math.inf
        trimmed.append([[value if abs(value) >= least else 0.0 for value in row] for row in delta])
    got = apply("ties", stacked, weights, density=density)
    for row in range(6):
        for column in range(7):
            weighed = [w * delta[row][column] for w, delta in zip(weights, trimmed, strict=True)]
            sign = 1 if sum(weighed) >= 0 else -1
            agreeing = [(w, value) for w, value in zip(weights, weighed, strict=True) if value * sign > 0]
            want = sum(value for _, value in agreeing) / sum(abs(w) for w, _ in agreeing) if agreeing else 0.0
            assert float(got[row, column]) == pytest.approx(want, rel=1e-6, abs=1e-9)


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


def robustly_merged(stacked: Tensor, weights: list[float], density: float) -> list[list[float]]:
    """RobustMerge by loops over numbers, from NumPy's singular vectors on."""

    def trimmed(matrix: list[list[float]]) -> list[list[float]]:
        sizes = sorted((abs(value) for row in matrix for value in row), reverse=True)
        kept = int(density * len(sizes))
        return [[value if kept and abs(value) >= sizes[kept - 1] else 0.0 for value in row] for row in matrix]

    _, rows, columns = stacked.shape
    members = []
    for delta, weight in zip(stacked, weights, strict=True):
        u, s, vt = np.linalg.svd(delta.numpy())
        rank = sum(1 for value in s if value > s[0] * max(rows, columns) * 1.1920929e-07)
        a = [[math.sqrt(s[i]) * vt[i, n] for n in range(columns)] for i in range(rank)]
        b = [[math.sqrt(s[i]) * u[m, i] for i in range(rank)] for m in range(rows)]
        small_a, small_b = trimmed(a), trimmed(b)
        lost = []
        for i in range(rank):
            left = sum(abs(value) for value in small_a[i])
            lost.append(sum(abs(value) for value in a[i]) / left if left else 0.0)
        floor = sorted(lost)[int(0.8 * rank)]
        members.append((weight, small_b, small_a, [max(value, floor) if value else 0.0 for value in lost]))
    merged = [[0.0] * columns for _ in range(rows)]
    for weight, b, a, scales in members:
        for i, scale in enumerate(scales):
            total = sum(others[i] for _, _, _, others in members if i < len(others))
            for m in range(rows):
                for n in range(columns):
                    merged[m][n] += weight * b[m][i] * (scale / total if total else 0.0) * a[i][n]
    return merged


@given(SEEDS, WEIGHTS, DENSITIES, st.booleans())
def test_robust_merge_number_by_number(seed: int, weights: list[float], density: float, turned: bool):
    """Also of deltas of different ranks, and with a weight below 0."""
    weights = [-weights[0], *weights[1:]] if turned else weights
    stacked = deltas(seed)
    first = stacked[0] = stacked[0, :, :2] @ stacked[0, :2, :]
    assert torch.linalg.matrix_rank(first) == 2
    got = apply("robust_merge", stacked, weights, density=density)
    assert close(got, torch.tensor(robustly_merged(stacked, weights, density), dtype=torch.float64))


def test_robust_merge_evens_tasks_out_and_makes_up_for_what_is_pruned():
    same = deltas(6, count=1).repeat(3, 1, 1)
    assert close(apply("robust_merge", same, [1.0, 1.0, 1.0], density=1.0), same[0]), "a mean of what all have"
    two = deltas(7, count=2)
    assert close(
        apply("robust_merge", torch.cat([two, same[:1]]), [1.0, 0.5, 0.0]), apply("robust_merge", two, [1.0, 0.5])
    ), "what weighs nothing takes no share"
    # One direction each: the first lies in one column, the second loses the two smaller of its four.
    one, other = torch.zeros(2, 4, 4, dtype=torch.float64)
    one[0, 0] = 1.0
    other[1] = torch.tensor([0.6, -0.6, 0.4, 0.2])
    made_up = 1.8 / 1.2
    got = apply("robust_merge", torch.stack([one, other]), [1.0, 1.0], density=0.5)
    assert close(got[0], one[0] / (1 + made_up))
    assert close(got[1], made_up / (1 + made_up) * torch.tensor([0.6, -0.6, 0.0, 0.0], dtype=torch.float64))


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


@given(SEEDS, st.floats(0.1, 0.9))
def test_mergekits_scaling_keeps_the_norm_that_was_there(seed: int, density: float):
    delta = deltas(seed, count=1)[0]
    ranked = sparsify.ranked(delta, density, 0.1, generator(seed), by_norm=True)
    for thinned in (sparsify.random(delta, density, generator(seed), by_norm=True), ranked):
        if thinned.abs().sum() > 0:
            assert float(thinned.abs().sum()) == pytest.approx(float(delta.abs().sum()))
            kept = thinned[thinned != 0] / delta[thinned != 0]
            assert close(kept, kept[:1].expand_as(kept))


def test_mergekits_dare_ties_adds_up_what_agrees():
    same = deltas(0, count=1).repeat(2, 1, 1)
    assert close(apply("dare_ties", same, [0.5, 1.0], density=1.0, convention="mergekit"), 1.5 * same[0])
    assert close(apply("dare_ties", same, [0.5, 1.0], density=1.0), same[0])
