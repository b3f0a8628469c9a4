"""Each merge method once more, written from its paper in NumPy and fp64: what merges are checked against.

Imports none of the code that merges. A statement here is short before it is quick.

Shape legend: T adapters, M rows, N columns of a delta, in whatever space.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from lora_runtime.merge.methods import Options

Array = NDArray[np.float64]
Statement = Callable[[Array, Array, Options, Array], Array]
"""Deltas (T, M, N), weights (T,), options and numbers drawn evenly from [0, 1) for each entry, to the merged delta."""

ROUNDING = 1e-6
"""Of the largest entries: votes of both signs that add up to less cancel."""
SHARED = 1e-4
"""Of the largest: a singular value of directions side by side that is smaller is 0."""


def drawn(seed: int, leaf: str, shape: tuple[int, ...]) -> Array:
    """What random methods draw for a leaf, of ``shape`` (T, M, N): adapters in the order of their versions."""
    digest = hashlib.blake2b(f"{seed}/{leaf}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") // 2)
    num, rows, columns = shape
    draws = [torch.rand((rows, columns), generator=generator, dtype=torch.float64).numpy() for _ in range(num)]
    return np.stack(draws)


def linear(d: Array, w: Array, _: Options, __: Array) -> Array:
    """Task arithmetic (arXiv 2212.04089): Σ wₜDₜ."""
    total: Array = np.tensordot(w, d, axes=1)
    return total


def magnitude_prune(d: Array, w: Array, options: Options, u: Array) -> Array:
    return linear(_trimmed(d, options.density), w, options, u)


def ties(d: Array, w: Array, options: Options, _: Array) -> Array:
    """arXiv 2306.01708: trim, elect, disjoint mean."""
    return _disjoint(_trimmed(d, options.density), w, options.convention)


def dare_linear(d: Array, w: Array, options: Options, u: Array) -> Array:
    """arXiv 2311.03099: entries stay with probability p, over p."""
    return linear(_thinned(d, u, np.full(d.shape, options.density), options.convention), w, options, u)


def dare_ties(d: Array, w: Array, options: Options, u: Array) -> Array:
    thin = _thinned(d, u, np.full(d.shape, options.density), options.convention)
    if options.convention != "mergekit":
        return _disjoint(thin, w, options.convention)
    votes = w[:, None, None] * thin
    plus, minus = np.where(votes > 0, votes, 0).sum(0), np.where(votes < 0, votes, 0).sum(0)
    merged: Array = np.where(plus + minus >= 0, plus, minus)
    return merged


def della(d: Array, w: Array, options: Options, u: Array) -> Array:
    """arXiv 2406.11617: the r-th smallest of a row's n entries stays with p - ε/2 + ε·r/(n - 1), over that."""
    if options.density >= 1:
        return _disjoint(d, w, options.convention)
    width = options.epsilon * (2 if options.convention == "mergekit" else 1)
    columns = d.shape[2]
    stays = np.full(d.shape, options.density)
    if columns > 1:
        for t, m in np.ndindex(d.shape[:2]):
            order = np.argsort(np.abs(d[t, m]), kind="stable")
            stays[t, m, order] = options.density - width / 2 + width * np.arange(columns) / (columns - 1)
    return _disjoint(_thinned(d, u, stays, options.convention), w, options.convention)


def breadcrumbs(d: Array, w: Array, options: Options, u: Array) -> Array:
    """arXiv 2312.06795: without the γ largest; of the others the largest, so that ``density`` of all stay."""
    kept = np.zeros(d.shape)
    size = d[0].size
    stay = min(int(options.density * size), size)
    skip = min(int(options.gamma * size), size - stay)
    for delta, out in zip(d, kept, strict=True):
        order = np.argsort(-np.abs(delta), axis=None, kind="stable")[skip : skip + stay]
        out.flat[order] = delta.flat[order]
    return linear(kept, w, options, u)


def tsv(d: Array, w: Array, _: Options, __: Array) -> Array:
    """arXiv 2412.00081: Σₜ of Û diag(S) V̂ᵀ with X̂ = X (XᵀX)^-½, X the tasks' first singular vectors side by side."""
    parts = [_svd(delta) for delta in d]
    k = max(1, min(sum(len(s) for _, s, _ in parts), *d.shape[1:]) // len(d))
    signed = [(u[:, :k] * np.where(x < 0, -1, 1), s[:k] * abs(x), v[:k]) for (u, s, v), x in zip(parts, w, strict=True)]
    left = _whitened(np.concatenate([u for u, _, _ in signed], axis=1))
    right = _whitened(np.concatenate([v.T for _, _, v in signed], axis=1))
    merged: Array = left @ np.diag(np.concatenate([s for _, s, _ in signed])) @ right.T
    return merged


def iso_c(d: Array, w: Array, options: Options, u: Array) -> Array:
    """arXiv 2502.04959: all singular values of the sum made their mean."""
    left, s, right = _svd(linear(d, w, options, u))
    merged: Array = left @ right * (s.mean() if len(s) else 0.0)
    return merged


def karcher(d: Array, w: Array, _: Options, __: Array) -> Array:
    """arXiv 2603.04972, in coefficients of the directions: their inner products are all that is needed."""
    flat = d.reshape(len(d), -1)
    norms = np.sqrt((flat**2).sum(1))
    size = float(w @ norms / w.sum())
    flat, share, norms = flat[norms > 0], w[norms > 0], norms[norms > 0]
    if not len(flat):
        return np.zeros(d.shape[1:])
    share, units = share / share.sum(), flat / norms[:, None]
    gram = units @ units.T
    c = share / np.sqrt(share @ gram @ share)
    for _step in range(1000):
        cosines = np.clip(gram @ c, -1, 1)
        angles = np.arccos(cosines)
        pull = share / np.sinc(angles / np.pi)
        step = pull - (pull @ cosines) * c
        length = np.sqrt(max(0.0, step @ gram @ step))
        if length < 1e-13:
            break
        c = np.cos(length) * c + np.sin(length) / length * step
        c /= np.sqrt(c @ gram @ c)
    merged: Array = (size * (c @ units)).reshape(d.shape[1:])
    return merged


def robust_merge(d: Array, w: Array, options: Options, _: Array) -> Array:
    """arXiv 2502.17159, of balanced factors; rules.robust_merge says what is taken from it and what is not."""
    parts = []
    for delta in d[w != 0]:
        u, s, v = _svd(delta)
        b, a = u * np.sqrt(s), np.sqrt(s)[:, None] * v
        small_b, small_a = _trimmed(b[None], options.density)[0], _trimmed(a[None], options.density)[0]
        before, after = np.abs(a).sum(1), np.abs(small_a).sum(1)
        lost = np.divide(before, after, out=np.zeros(len(s)), where=after > 0)
        floor = np.sort(lost)[int(0.8 * len(s))] if len(s) else 0.0
        parts.append((small_b, small_a, np.where(after > 0, np.maximum(lost, floor), 0.0)))
    merged = np.zeros(d.shape[1:])
    for weight, (b, a, scale) in zip(w[w != 0], parts, strict=True):
        for i in range(len(scale)):
            total = sum(other[i] for _, _, other in parts if i < len(other))
            if total > 0:
                merged += weight * scale[i] / total * np.outer(b[:, i], a[i])
    return merged


def _trimmed(d: Array, density: float) -> Array:
    kept = np.zeros(d.shape)
    for delta, out in zip(d, kept, strict=True):
        order = np.argsort(-np.abs(delta), axis=None, kind="stable")[: int(density * delta.size)]
        out.flat[order] = delta.flat[order]
    return kept


def _thinned(d: Array, u: Array, stays: Array, convention: str) -> Array:
    if (stays >= 1).all():
        return d
    kept: Array = np.where(u < stays, d, 0.0)
    if convention != "mergekit":
        return np.asarray(kept / stays)
    for delta, out in zip(d, kept, strict=True):
        before, after = np.abs(delta).sum(), np.abs(out).sum()
        out *= before / after if min(before, after) >= 1e-7 else 1.0
    return kept


def _disjoint(d: Array, w: Array, convention: str) -> Array:
    """By γ = sgn Σ: the two candidates, of those that vote plus and of those that vote minus, and which is elected."""
    weighed = w[:, None, None] * d
    votes = d if convention == "peft" else weighed
    size = np.ones(len(d)) if convention == "peft" else np.abs(w)
    means = []
    for side in (votes > 0, votes < 0):
        shares = np.tensordot(size, side, axes=1)
        means.append(np.where(side, weighed, 0.0).sum(0) / np.where(shares > 0, shares, 1.0))
    total = votes.sum(0)
    merged: Array = np.where(total >= 0, *means)
    if convention == "loom":
        plus, minus = (votes > 0).any(axis=0), (votes < 0).any(axis=0)
        merged[plus & minus & (np.abs(total) <= ROUNDING * np.abs(votes).max(axis=(1, 2)).sum())] = 0.0
    return merged


def _svd(delta: Array) -> tuple[Array, Array, Array]:
    """Of numerical rank, as fp32 factors have it."""
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    rank = int((s > s[:1] * max(delta.shape) * 2.0**-23).sum())
    return u[:, :rank], s[:rank], v[:rank]


def _whitened(x: Array) -> Array:
    values, vectors = np.linalg.eigh(x.T @ x)
    there = values > values[-1:] * SHARED**2
    merged: Array = x @ (vectors[:, there] / np.sqrt(values[there])) @ vectors[:, there].T
    return merged


STATEMENTS: Mapping[str, Statement] = MappingProxyType(
    {
        "linear": linear,
        "magnitude_prune": magnitude_prune,
        "ties": ties,
        "dare_linear": dare_linear,
        "dare_ties": dare_ties,
        "della": della,
        "breadcrumbs": breadcrumbs,
        "tsv": tsv,
        "iso_c": iso_c,
        "karcher": karcher,
        "robust_merge": robust_merge,
    }
)
"""By the rule's name."""
