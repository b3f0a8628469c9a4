"""Rules that make one delta of several. A rule is a typed pure function and a row in :data:`RULES`.

Each takes deltas in whatever space (the small core, or dense), weights, and options; element-wise rules mean something
else in each space, so a recipe says which. Shape legend: T adapters, M rows, N columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Generator, Tensor

from lora_runtime.merge import sparsify

Convention = Literal["mergekit", "peft"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Of a recipe, for the rules that have them.

    ``density``: the share of entries that stay. ``epsilon``: DELLA's spread of it. ``gamma``: the share of largest
    entries that breadcrumbs drop. ``convention``: whose TIES it is: mergekit elects signs after weighting and divides
    by the weights of those that agree; PEFT elects before and divides by their number.
    """

    density: float = 0.5
    epsilon: float = 0.2
    gamma: float = 0.01
    convention: Convention = "mergekit"


Apply = Callable[[Tensor, Tensor, Options, Generator], Tensor]


@dataclass(frozen=True, slots=True)
class Rule:
    """``semantics`` grows when the same recipe would give another result. ``reference`` is where the formula is from.

    ``is_elementwise``: whether the space matters to it. ``is_random``: whether the seed does. ``needs_positive``: a
    mean, which has no meaning for negative weights.
    """

    name: str
    semantics: int
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
    return elected(_dropped(deltas_TMN, options, generator), weights_T, options.convention)


def della(deltas_TMN: Tensor, weights_T: Tensor, options: Options, generator: Generator) -> Tensor:
    """TIES' election over deltas that MagPrune thinned out."""
    thinned = _each(deltas_TMN, lambda d: sparsify.ranked(d, options.density, options.epsilon, generator))
    return elected(thinned, weights_T, options.convention)


def breadcrumbs(deltas_TMN: Tensor, weights_T: Tensor, options: Options, generator: Generator) -> Tensor:
    """Σ wᵢDᵢ without the smallest and the very largest entries of each."""
    kept = _each(deltas_TMN, lambda d: sparsify.without_outliers(d, options.density, options.gamma))
    return linear(kept, weights_T, options, generator)


def tsv(deltas_TMN: Tensor, weights_T: Tensor, _: Options, __: Generator) -> Tensor:
    """Singular vectors of all tasks side by side, each task's strongest 1/T, made orthogonal.

    Û·diag(S)·V̂ᵀ with Û the orthogonal matrix nearest to [U₁ … U_T] (Procrustes), V̂ likewise. A weight scales its
    task's singular values, a negative one turns its left vectors round. 1/T is of the tasks' ranks together, so that
    the space does not matter.
    """
    num_tasks, rows, columns = deltas_TMN.shape
    parts = [_directions(delta) for delta in deltas_TMN]
    width = max(1, min(sum(len(s) for _, s, _ in parts), rows, columns) // num_tasks)
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


def elected(deltas_TMN: Tensor, weights_T: Tensor, convention: Convention) -> Tensor:
    """Entries whose sign is the elected one, averaged (arXiv 2306.01708, §4.2-4.3)."""
    weights = weights_T[:, None, None]
    weighted = deltas_TMN * weights
    voters = weighted if convention == "mergekit" else deltas_TMN
    elected_sign = torch.where(voters.sum(0) >= 0, 1.0, -1.0)
    agrees = voters.sign() == elected_sign
    total = (weighted * agrees).sum(0)
    if convention == "peft":
        return total / agrees.sum(0).clamp(min=1)
    shares = (weights * agrees).sum(0)
    return total / torch.where(shares.abs() < 1e-8, 1.0, shares)


def _dropped(deltas_TMN: Tensor, options: Options, generator: Generator) -> Tensor:
    return _each(deltas_TMN, lambda d: sparsify.random(d, options.density, generator))


def _each(deltas_TMN: Tensor, thin: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([thin(delta) for delta in deltas_TMN])


def _directions(delta_MN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and Vᵀ of the singular values that are more than rounding. The directions of the others are any, and would
    push those of other tasks aside."""
    u, s, vt = torch.linalg.svd(delta_MN, full_matrices=False)
    there = s > s[0] * max(delta_MN.shape) * torch.finfo(torch.float32).eps
    return u[:, there], s[there], vt[there]


def _orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns."""
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = u @ vt
    return nearest


def _direction(units_TX: Tensor, shares_T: Tensor, steps: int = 100, tolerance: float = 1e-12) -> Tensor:
    mean = shares_T @ units_TX
    mean = units_TX[0] if float(mean.norm()) < 1e-6 else mean / mean.norm()
    for _ in range(steps):
        cosines = (units_TX @ mean).clamp(-1.0, 1.0)
        angles = torch.arccos(cosines)
        # sin θ/θ → 1 as θ → 0
        ratios = torch.where(angles < 1e-9, torch.ones_like(angles), angles / torch.sin(angles).clamp(min=1e-12))
        tangent = (shares_T * ratios) @ (units_TX - cosines[:, None] * mean)
        length = float(tangent.norm())
        if length < tolerance:
            break
        mean = math.cos(length) * mean + math.sin(length) * tangent / length
        mean = mean / mean.norm()
    return mean


_TIES = "arXiv 2306.01708"
RULES: Mapping[str, Rule] = MappingProxyType(
    {
        rule.name: rule
        for rule in (
            Rule("linear", 1, "arXiv 2212.04089", linear, is_elementwise=False),
            Rule("magnitude_prune", 1, _TIES, magnitude_prune),
            Rule("ties", 1, _TIES, ties),
            Rule("dare_linear", 1, "arXiv 2311.03099", dare_linear, is_random=True),
            Rule("dare_ties", 1, f"arXiv 2311.03099, {_TIES}", dare_ties, is_random=True),
            Rule("della", 1, "arXiv 2406.11617", della, is_random=True),
            Rule("breadcrumbs", 1, "arXiv 2312.06795", breadcrumbs),
            Rule("tsv", 1, "arXiv 2412.00081", tsv, is_elementwise=False),
            Rule("iso_c", 1, "arXiv 2502.04959", iso_c, is_elementwise=False),
            Rule("karcher", 1, "arXiv 2603.04972", karcher, is_elementwise=False, needs_positive=True),
        )
    }
)
