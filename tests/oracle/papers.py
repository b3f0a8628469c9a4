"""Merge methods a second time, from their papers and as plainly as can be: loops over numbers, dense deltas, fp64.

Only what is drawn at random is the project's: a torch generator seeded by the recipe's seed and the leaf's name.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
EPS32 = 2.0**-23


def core_of(deltas: Sequence[Matrix]) -> tuple[Matrix, list[Matrix], Matrix]:
    """Core Space (arXiv 2509.17786) from dense deltas: left singular vectors of all √-balanced factors side by side."""
    lefts, rights = [], []
    for delta in deltas:
        u, s, v = np.linalg.svd(delta, full_matrices=False)
        there = s > s[0] * 1e-6
        lefts.append(u[:, there] * np.sqrt(s[there]))
        rights.append(v[there].T * np.sqrt(s[there]))
    left, right = (_span(np.concatenate(side, axis=1)) for side in (lefts, rights))
    return left, [left.T @ delta @ right for delta in deltas], right


def _span(columns: Matrix) -> Matrix:
    u, s, _ = np.linalg.svd(columns, full_matrices=False)
    return u[:, s > s[0] * 1e-6]


def uniforms(seed: int, leaf: str, count: int, shape: tuple[int, int]) -> list[Matrix]:
    digest = hashlib.blake2b(f"{seed}/{leaf}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return [torch.rand(shape, generator=generator, dtype=torch.float64).numpy() for _ in range(count)]


def largest(delta: Matrix, count: int) -> Matrix:
    """The ``count`` entries of largest size."""
    if count <= 0:
        return np.zeros_like(delta)
    least = sorted(np.abs(delta).ravel(), reverse=True)[count - 1]
    return np.where(np.abs(delta) >= least, delta, 0.0)


def dropped(delta: Matrix, drawn: Matrix, stays: Matrix | float, by_norm: bool) -> Matrix:
    kept = delta * (drawn < stays)
    return kept * np.abs(delta).sum() / np.abs(kept).sum() if by_norm else kept / stays


def della_stays(delta: Matrix, density: float, spread: float) -> Matrix:
    stays = np.empty_like(delta)
    for m, row in enumerate(delta):
        for rank, n in enumerate(sorted(range(len(row)), key=lambda n: abs(row[n]))):
            stays[m, n] = density - spread / 2 + spread * rank / (len(row) - 1)
    return stays


def elected(deltas: Sequence[Matrix], weights: Sequence[float], convention: str, divided: bool = True) -> Matrix:
    merged = np.zeros_like(deltas[0])
    noise = 1e-6 * sum(abs(w) * np.abs(d).max() for w, d in zip(weights, deltas, strict=True))
    for at in np.ndindex(merged.shape):
        weighed = [w * d[at] for w, d in zip(weights, deltas, strict=True)]
        votes = [d[at] for d in deltas] if convention == "peft" else weighed
        total = sum(votes)
        if convention == "loom" and abs(total) <= noise and min(votes) < 0 < max(votes):
            continue
        sign = 1 if total >= 0 else -1
        agree = [i for i, vote in enumerate(votes) if vote * sign > 0]
        if agree:
            by = len(agree) if convention == "peft" else sum(abs(weights[i]) for i in agree)
            merged[at] = sum(weighed[i] for i in agree) / (by if divided else 1)
    return merged


def polar(matrix: Matrix) -> Matrix:
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    there = s > 1e-4 * s[0]
    return u[:, there] @ v[there]


def tsv(deltas: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    parts = [svd(delta) for delta in deltas]
    width = min(sum(len(s) for _, s, _ in parts), *deltas[0].shape) // len(deltas)
    left = polar(np.hstack([u[:, :width] for u, _, _ in parts]))
    right = polar(np.vstack([v[:width] for _, _, v in parts]))
    # A task's sign is as well carried by its values.
    return left @ np.diag(np.concatenate([w * s[:width] for w, (_, s, _) in zip(weights, parts, strict=True)])) @ right


def svd(delta: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Without singular values that are rounding: an adapter's own rank."""
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    there = s > s[0] * 1e-5
    return u[:, there], s[there], v[there]


def iso_c(total: Matrix) -> Matrix:
    u, s, v = svd(total)
    return float(np.mean(s)) * u @ v


def karcher(deltas: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    """Descent on f(x) = Σ wᵢ·θ(x, xᵢ)²/2 by small steps."""
    norms = [float(np.linalg.norm(d)) for d in deltas]
    units = [d / norm for d, norm in zip(deltas, norms, strict=True)]
    shares = [w / sum(weights) for w in weights]
    mean = sum(share * unit for share, unit in zip(shares, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    for _ in range(3000):
        pull = np.zeros_like(mean)
        for share, unit in zip(shares, units, strict=True):
            cosine = min(1.0, max(-1.0, float((unit * mean).sum())))
            side = unit - cosine * mean
            if (size := float(np.linalg.norm(side))) > 1e-14:
                pull += share * math.acos(cosine) * side / size
        mean = mean + 0.5 * pull
        mean = mean / np.linalg.norm(mean)
    return mean * sum(share * norm for share, norm in zip(shares, norms, strict=True))


def robust_merge(deltas: Sequence[Matrix], weights: Sequence[float], density: float) -> Matrix:
    factors = []
    for delta in deltas:
        u, s, v = svd(delta)
        b, a = u * np.sqrt(s), np.sqrt(s)[:, None] * v
        small = largest(a, int(density * a.size))
        sizes = [(float(np.abs(x).sum()), float(np.abs(y).sum())) for x, y in zip(a, small, strict=True)]
        lost = [before / after if after else 0.0 for before, after in sizes]
        floor = sorted(lost)[int(0.8 * len(lost))]
        factors.append((largest(b, int(density * b.size)), small, [max(x, floor) if x else 0.0 for x in lost]))
    merged = np.zeros_like(deltas[0])
    for weight, (b, a, scales) in zip(weights, factors, strict=True):
        for i, scale in enumerate(scales):
            if total := sum(others[i] for _, _, others in factors if i < len(others)):
                merged += weight * scale / total * np.outer(b[:, i], a[i])
    return merged


def truncated(delta: Matrix, rank: int) -> Matrix:
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def merged(leaf: str, deltas: Sequence[Matrix], weights: Sequence[float], recipe: dict[str, object]) -> Matrix:
    """What ``recipe`` makes of the dense deltas of one leaf, in the order of their adapters' versions."""
    method = str(recipe["method"])
    in_core = method in ("ties", "magnitude_prune", "breadcrumbs", "robust_merge", "dare_linear", "dare_ties", "della")
    there = [(d, w) for d, w in zip(deltas, weights, strict=True) if w]
    deltas, weights = [d for d, _ in there], [w for _, w in there]
    if in_core and recipe.get("space", "core") == "core":
        left, cores, right = core_of(deltas)
        return left @ _made(method, leaf, cores, weights, recipe) @ right.T
    return _made(method, leaf, deltas, weights, recipe)


def _made(method: str, leaf: str, d: Sequence[Matrix], w: Sequence[float], recipe: dict[str, object]) -> Matrix:
    density, epsilon = float(recipe.get("density", 0.5)), float(recipe.get("epsilon", 0.2))  # type: ignore[arg-type]
    gamma, convention = float(recipe.get("gamma", 0.01)), str(recipe.get("convention", "loom"))  # type: ignore[arg-type]
    is_mergekits = convention == "mergekit"
    size = d[0].size

    def total(parts: Sequence[Matrix]) -> Matrix:
        return np.sum([x * part for x, part in zip(w, parts, strict=True)], axis=0)

    if method in ("dare_linear", "dare_ties", "della"):
        draws = uniforms(int(recipe.get("seed", 0)), leaf, len(d), d[0].shape)  # type: ignore[call-overload, arg-type]
        if method == "della":
            stays = [della_stays(delta, density, epsilon * (2 if is_mergekits else 1)) for delta in d]
        else:
            stays = [np.full_like(delta, density) for delta in d]
        thin = [dropped(*each, is_mergekits) for each in zip(d, draws, stays, strict=True)]
        if method == "dare_linear":
            return total(thin)
        return elected(thin, w, convention, divided=method == "della" or not is_mergekits)
    if method in ("ties", "magnitude_prune"):
        trimmed = [largest(delta, int(density * size)) for delta in d]
        return elected(trimmed, w, convention) if method == "ties" else total(trimmed)
    if method == "breadcrumbs":
        skipped = int(gamma * size)
        return total([largest(x, skipped + int(density * size)) - largest(x, skipped) for x in d])
    if method in ("tsv", "core_tsv"):
        return tsv(d, w)
    if method in ("slerp", "karcher"):
        return karcher(d, w)
    if method == "robust_merge":
        return robust_merge(d, w, density)
    return iso_c(total(d)) if method == "iso_c" else total(d)
