"""Rules that make one delta of several. A rule is a typed pure function and a row in :data:`RULES`.

Each takes deltas in whatever space (the small core, or dense), weights, and options; element-wise rules mean something
else in each space, so a recipe says which. Shape legend: T adapters, M rows, N columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Generator, Tensor

from lora_runtime.errors import InvalidCombination
from lora_runtime.merge import sparsify
from lora_runtime.merge.methods import Convention, Options

Apply = Callable[[Tensor, Tensor, Options, Generator], Tensor]
UNDECIDED = 1e-6
"""Of the largest entries together: votes that add up to less cancel, as far as fp32 factors can tell."""
MERGEKITS_LEAST = 1e-8
"""A sum of weights that mergekit does not divide by."""
OPPOSITE = 1e-6
"""How near to -1 a cosine is, or to 0 the length of a mean, where a direction is rounding."""
DEPENDENT = 1e-4
"""Singular values of directions side by side, relative to the largest, below which one is in the span of the others."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A row of the table. ``reference`` is where the formula is from.

    ``is_elementwise``: whether the space matters to it. ``is_random``: whether the seed does. ``needs_positive``: a
    mean, which has no meaning for negative weights.
    """

    name: str
    reference: str
    apply: Apply
    is_elementwise: bool = True
    is_random: bool = False
    needs_positive: bool = False


def linear(deltas_TMN: Tensor, weights_T: Tensor, _: Options, __: Generator) -> Tensor:
    """Σ wᵢDᵢ: task arithmetic."""
    return torch.einsum("t,tmn->mn", weights_T, deltas_TMN)


def magnitude_prune(deltas_TMN: Tensor, weights_T: Tensor, options: Options, generator: Generator) -> Tensor:
    """Σ wᵢ·trim(Dᵢ)."""
    return linear(_each(deltas_TMN, lambda d: sparsify.magnitude(d, options.density)), weights_T, options, generator)


def ties(deltas_TMN: Tensor, weights_T: Tensor, options: Options, _: Generator) -> Tensor:
    """Trim, elect a sign for each entry, and average those that agree with it."""
    return elected(_each(deltas_TMN, lambda d: sparsify.magnitude(d, options.density)), weights_T, options.convention)


def dare_linear(deltas_TMN: Tensor, weights_T: Tensor, options: Options, generator: Generator) -> Tensor:
    """Σ wᵢ·DARE(Dᵢ)."""
    return linear(_dropped(deltas_TMN, options, generator), weights_T, options, generator)


def dare_ties(deltas_TMN: Tensor, weights_T: Tensor, options: Options, generator: Generator) -> Tensor:
    """TIES' election over deltas that DARE thinned out."""
    thinned = _dropped(deltas_TMN, options, generator)
    return elected(thinned, weights_T, options.convention, is_divided=options.convention != "mergekit")


def della(deltas_TMN: Tensor, weights_T: Tensor, options: Options, generator: Generator) -> Tensor:
    """TIES' election over deltas that MagPrune thinned out."""
    is_mergekits = options.convention == "mergekit"
    spread = 2 * options.epsilon if is_mergekits else options.epsilon

    def thin(delta_MN: Tensor) -> Tensor:
        return sparsify.ranked(delta_MN, options.density, spread, generator, by_norm=is_mergekits)

    return elected(_each(deltas_TMN, thin), weights_T, options.convention)


def breadcrumbs(deltas_TMN: Tensor, weights_T: Tensor, options: Options, generator: Generator) -> Tensor:
    """Σ wᵢDᵢ without the smallest and the very largest entries of each."""
    kept = _each(deltas_TMN, lambda d: sparsify.without_outliers(d, options.density, options.gamma))
    return linear(kept, weights_T, options, generator)


def tsv(deltas_TMN: Tensor, weights_T: Tensor, _: Options, __: Generator) -> Tensor:
    """Singular vectors of all tasks side by side, each task's strongest 1/T, made orthogonal.

    Û·diag(S)·V̂ᵀ with Û the orthogonal matrix nearest to [U₁ … U_T] (Procrustes), V̂ likewise. A weight scales its
    task's singular values, a negative one turns its left vectors round. 1/T is of the tasks' ranks together, so that
    the space does not matter.

    Where tasks share directions, no orthogonal matrix is nearest; Û is the partial isometry of the polar decomposition
    then, the part of it that is determined. So equal tasks are averaged: two of D with weight 1 make D.
    """
    parts, width = _strongest(deltas_TMN)
    left = _orthogonal(
        torch.cat([u[:, :width] * (-1.0 if w < 0 else 1.0) for (u, _, _), w in zip(parts, weights_T, strict=True)], 1)
    )
    right = _orthogonal(torch.cat([vt[:width] for _, _, vt in parts]))
    values = torch.cat([s[:width] * w.abs() for (_, s, _), w in zip(parts, weights_T, strict=True)])
    merged: Tensor = (left * values) @ right
    return merged


def iso_c(deltas_TMN: Tensor, weights_T: Tensor, options: Options, generator: Generator) -> Tensor:
    """Σ wᵢDᵢ with every singular value that there is made their mean: no direction outweighs another."""
    u, s, vt = _directions(linear(deltas_TMN, weights_T, options, generator))
    merged: Tensor = (u @ vt) * (s.mean() if len(s) else 0.0)
    return merged


def karcher(deltas_TMN: Tensor, weights_T: Tensor, _: Options, __: Generator) -> Tensor:
    """The mean on the sphere of directions, times the weighted mean of the norms.

    x ← exp_x(Σ wᵢ·log_x(xᵢ)) until it stays (Karcher 1977), weights made to sum to 1. Of two deltas it is slerp.
    Raises InvalidCombination for opposite directions, which have no mean.
    """
    norms = deltas_TMN.flatten(1).norm(dim=1)
    there = (norms > 0) & (weights_T != 0)
    if not there.any():
        return torch.zeros_like(deltas_TMN[0])
    shares = weights_T / weights_T.sum()
    units = deltas_TMN[there].flatten(1) / norms[there, None]
    mean = _direction(units, shares[there] / shares[there].sum())
    merged: Tensor = (mean * (shares * norms).sum()).view_as(deltas_TMN[0])
    return merged


def robust_merge(deltas_TMN: Tensor, weights_T: Tensor, options: Options, _: Generator) -> Tensor:
    """Σ wₜ·B̃ₜ·diag(sₜ / Σᵤ sᵤ)·Ãₜ: weak directions made up for what pruning took, and tasks evened out direction by
    direction (RobustMerge: Zeng et al., NeurIPS 2025, arXiv 2502.17159).

    Bₜ = U√Σ and Aₜ = √Σ·Vᵀ are each delta's balanced factors, the strongest direction first; B̃ₜ and Ãₜ their trimmed
    ones, at ``density`` each. sₜᵢ = ‖row i of Aₜ‖₁ / ‖row i of Ãₜ‖₁, at least the 0.8 quantile of the task's own, and 0
    where nothing of the row is left. Adapters of weight 0 count for nothing.

    The authors' code differs. It takes A and B as they were trained, and counts directions by their rows there; here
    they follow from the delta. It adds the Aₜ up, and apart from them the Bₜ, so that each task's B also meets the
    others' A: what that adds depends on the order and the signs of rows, which a delta does not determine. And it
    doubles both sums, which is a recipe's ``scale`` 4; its density is 0.2.
    """
    parts = [
        _pruned_directions(delta, weight, options.density)
        for delta, weight in zip(deltas_TMN, weights_T, strict=True)
        if weight != 0
    ]
    totals = torch.zeros(min(deltas_TMN.shape[1:]), dtype=deltas_TMN.dtype)
    for *_factors, scales in parts:
        totals[: len(scales)] += scales
    merged = torch.zeros_like(deltas_TMN[0])
    for b, a, scales in parts:
        shares = scales / torch.where(totals > 0, totals, 1.0)[: len(scales)]
        merged += (b * shares) @ a
    return merged


def elected(deltas_TMN: Tensor, weights_T: Tensor, convention: Convention, *, is_divided: bool = True) -> Tensor:
    """Entries whose sign is the elected one, averaged (arXiv 2306.01708, §4.2-4.3), or added up.

    Semantics: Σ_A wᵢDᵢ / Σ_A |wᵢ| over A = {i: sgn(wᵢDᵢ) = sgn Σ wⱼDⱼ}; see :data:`Convention` for what differs.
    """
    weights = weights_T[:, None, None]
    weighted = deltas_TMN * weights
    voters = deltas_TMN if convention == "peft" else weighted
    votes = voters.sum(0)
    if convention == "loom":
        is_close = votes.abs() <= UNDECIDED * voters.abs().flatten(1).amax(1).sum()
        is_contested = (voters > 0).any(0) & (voters < 0).any(0)
        elected_sign = torch.where(is_close & is_contested, 0.0, votes.sign())
    else:
        elected_sign = torch.where(votes >= 0, 1.0, -1.0)
    agrees = (voters.sign() == elected_sign) & (voters != 0)
    total = (weighted * agrees).sum(0)
    if not is_divided:
        return total
    if convention == "peft":
        return total / agrees.sum(0).clamp(min=1)
    shares = (weights.abs() * agrees).sum(0)
    return total / torch.where(shares > (MERGEKITS_LEAST if convention == "mergekit" else 0.0), shares, 1.0)


def _dropped(deltas_TMN: Tensor, options: Options, generator: Generator) -> Tensor:
    by_norm = options.convention == "mergekit"
    return _each(deltas_TMN, lambda d: sparsify.random(d, options.density, generator, by_norm=by_norm))


def _each(deltas_TMN: Tensor, thin: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([thin(delta) for delta in deltas_TMN])


def _directions(delta_MN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and Vᵀ of the singular values that are more than rounding. The directions of the others are any, and would
    push those of other tasks aside."""
    u, s, vt = torch.linalg.svd(delta_MN, full_matrices=False)
    there = s > s[0] * max(delta_MN.shape) * torch.finfo(torch.float32).eps
    return u[:, there], s[there], vt[there]


def independence(deltas_TMN: Tensor) -> float:
    """The smallest singular value of all tasks' strongest directions side by side, relative to the largest, on the side
    where it is smaller: 1 where they are orthogonal, 0 where one is in the span of the others."""
    parts, width = _strongest(deltas_TMN)
    sides = torch.cat([u[:, :width] for u, _, _ in parts], 1), torch.cat([vt[:width] for _, _, vt in parts])
    values = [torch.linalg.svdvals(side) for side in sides]
    return min((float(s[-1] / s[0]) for s in values if len(s)), default=1.0)


def _strongest(deltas_TMN: Tensor) -> tuple[list[tuple[Tensor, Tensor, Tensor]], int]:
    """Each task's singular vectors and values, and how many of them TSV keeps of each."""
    num_tasks, rows, columns = deltas_TMN.shape
    parts = [_directions(delta) for delta in deltas_TMN]
    return parts, max(1, min(sum(len(s) for _, s, _ in parts), rows, columns) // num_tasks)


def _pruned_directions(delta_MN: Tensor, weight: Tensor, density: float) -> tuple[Tensor, Tensor, Tensor]:
    """RobustMerge's B̃, with the weight in it, and Ã of balanced factors, and how much to scale each direction."""
    u, s, vt = _directions(delta_MN)
    root = s.sqrt()
    a = root[:, None] * vt
    pruned = sparsify.magnitude(a, density)
    before, after = a.abs().sum(1), pruned.abs().sum(1)
    scales = torch.where(after > 0, before / torch.where(after > 0, after, 1.0), 0.0)
    if len(scales):
        floor = scales.sort().values[int(_ROBUST_QUANTILE * len(scales))]
        scales = torch.where(after > 0, scales.clamp(min=floor), 0.0)
    return weight * sparsify.magnitude(u * root, density), pruned, scales


def _orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, as far as it is determined."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    there = s > s[:1] * DEPENDENT
    nearest: Tensor = u[:, there] @ vt[there]
    return nearest


def _direction(units_TX: Tensor, shares_T: Tensor, steps: int = 100, tolerance: float = 1e-12) -> Tensor:
    mean: Tensor = shares_T @ units_TX
    if float(mean.norm()) < OPPOSITE:
        raise _without_mean()
    mean = mean / mean.norm()
    length = math.inf
    for _ in range(steps):
        cosines = (units_TX @ mean).clamp(-1.0, 1.0)
        if float(cosines.min()) < OPPOSITE - 1.0:
            raise _without_mean()
        angles = torch.arccos(cosines)
        # sin θ/θ → 1 as θ → 0
        ratios = torch.where(angles < 1e-9, torch.ones_like(angles), angles / torch.sin(angles).clamp(min=1e-12))
        tangent = (shares_T * ratios) @ (units_TX - cosines[:, None] * mean)
        length = float(tangent.norm())
        if length < tolerance:
            break
        mean = math.cos(length) * mean + math.sin(length) * tangent / length
        mean = mean / mean.norm()
    if length > OPPOSITE:
        raise _without_mean()
    return mean


def _without_mean() -> InvalidCombination:
    return InvalidCombination(
        "Deltas of one module point in opposite directions, which have no mean on the sphere. Merge by 'linear', or "
        "leave one of the adapters out of this module (weight 0)."
    )


_ROBUST_QUANTILE = 0.8
_TIES = "arXiv 2306.01708"
RULES: Mapping[str, Rule] = MappingProxyType(
    {
        rule.name: rule
        for rule in (
            Rule("linear", "arXiv 2212.04089", linear, is_elementwise=False),
            Rule("magnitude_prune", _TIES, magnitude_prune),
            Rule("ties", _TIES, ties),
            Rule("dare_linear", "arXiv 2311.03099", dare_linear, is_random=True),
            Rule("dare_ties", f"arXiv 2311.03099, {_TIES}", dare_ties, is_random=True),
            Rule("della", "arXiv 2406.11617", della, is_random=True),
            Rule("breadcrumbs", "arXiv 2312.06795", breadcrumbs),
            Rule("tsv", "arXiv 2412.00081", tsv, is_elementwise=False),
            Rule("iso_c", "arXiv 2502.04959", iso_c, is_elementwise=False),
            Rule("robust_merge", "arXiv 2502.17159", robust_merge),
            Rule("karcher", "arXiv 2603.04972", karcher, is_elementwise=False, needs_positive=True),
        )
    }
)
