"""A merged leaf held against the method's independent statement, as it comes out of the merge.

What is compared is what the rule decides; that the core, in which it decides, is what it should be is checked by what
defines it, without the code that made it. NumPy and fp64.

Shape legend: M rows and N columns of a delta, P and Q the widths of the core.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from lora_runtime.errors import VerificationFailed
from lora_runtime.merge.methods import METHODS_OF
from lora_runtime.merge.recipe import Recipe
from lora_runtime.merge.reference import STATEMENTS, Array, drawn
from lora_runtime.merge.spaces import Core
from lora_runtime.weights import LoraFactors

Parts = Sequence[tuple[LoraFactors, float]]

MAX_VALUES = 1 << 24
"""Entries of all dense deltas of a leaf together, up to which a merge in the space ``full`` is checked: some 800 MB for
a second or two. Of Qwen2-VL-7B and three adapters those are the k, v and smaller projections."""
NUM_PROBES = 8
"""Vectors that matrices are compared on: E‖Ex‖² of normal x is ‖E‖², and no E hides from all of them."""
EXACT, DENSE = 1e-4, 5e-3
"""How far a result may be from the statement's, relative to it: in the core, where fp32 factors round an fp64 result;
and of dense fp32 deltas, where besides singular values of rounding go and entries at a threshold fall either way."""
CANCELLED = 1e-9
"""Of what is added up: a result that is smaller is rounding."""
BASIS = 1e-4
"""How far the core may be from what defines it."""


def check_leaf(recipe: Recipe, leaf: str, parts: Parts, found: LoraFactors, core: Core | None) -> bool:
    """Raise VerificationFailed unless ``found`` is what ``recipe``'s method makes of ``parts``; whether it was checked.

    ``core``: where it was merged; None for ``cat`` and in the space ``full``, where leaves of more than MAX_VALUES are
    passed over. In the core it costs about as much as the merge of the leaf (18944 x 3584, three adapters of rank 16,
    one core: 10 to 40 ms), for ``cat`` several times as much, and in the space ``full`` about twice.
    """
    members = [(_array(factors.b) * factors.scaling, _array(factors.a)) for factors, _ in parts]
    weights = np.array([weight for _, weight in parts]) * recipe.scale
    got = _array(found.b) * found.scaling, _array(found.a)
    probes = np.random.default_rng(zlib.crc32(leaf.encode())).standard_normal((got[1].shape[1], NUM_PROBES))
    size = sum(abs(w) * _norm(b) * _norm(a) for w, (b, a) in zip(weights, members, strict=True))
    if not all(np.isfinite(factor).all() for factor in got):
        raise VerificationFailed(
            f"The merge of '{leaf}' has NaN or infinity: its inputs or its weights are too large for fp32. Lower them.",
            check="finite",
            leaf=leaf,
        )
    _check_bias(recipe, leaf, parts, found)
    if core is not None:
        bases = _array(core.left_MP), _array(core.right_NQ)
        cores = _array(core.cores_TPQ)
        _check_core(leaf, members, bases, cores, probes)
        merged = _stated(recipe, leaf, cores, weights)
        if (rank := _rank(recipe, parts)) is None:
            away = _size(_applied(got, probes) - bases[0] @ (merged @ (bases[1].T @ probes)))
            _check(recipe, leaf, away, merged, EXACT, size)
        else:
            away = _norm((bases[0].T @ got[0]) @ (got[1] @ bases[1]) - merged)
            _check(recipe, leaf, away, merged, EXACT, size, rank=rank, got_rank=found.rank)
    elif recipe.method == "cat":
        each = [w * _applied(member, probes) for w, member in zip(weights, members, strict=True)]
        if not _size(_applied(got, probes) - np.sum(each, axis=0)) <= EXACT * size:
            raise _failed(leaf, "the sum of the weighted deltas", "more than rounding")
    elif len(parts) * got[0].shape[0] * got[1].shape[1] > MAX_VALUES:
        return False
    else:
        merged = _stated(recipe, leaf, np.stack([b @ a for b, a in members]), weights)
        rank = _rank(recipe, parts)
        _check(recipe, leaf, _norm(got[0] @ got[1] - merged), merged, DENSE, size, rank=rank, got_rank=found.rank)
    return True


def _stated(recipe: Recipe, leaf: str, deltas: Array, scaled: Array) -> Array:
    """``scaled``: the weights times the recipe's scale. Statements know no scale: it is divided out."""
    is_random = recipe.method in METHODS_OF["seed"] and recipe.density < 1
    draws = drawn(recipe.seed, leaf, deltas.shape) if is_random else np.empty(0)
    weights = scaled / recipe.scale if recipe.scale else np.zeros(len(scaled))
    return recipe.scale * STATEMENTS[recipe.rule](deltas, weights, recipe.options, draws)


def _rank(recipe: Recipe, parts: Parts) -> int | None:
    if recipe.rank is None and recipe.method == "svd":
        return max(factors.rank for factors, _ in parts)
    return recipe.rank


def _check(
    recipe: Recipe,
    leaf: str,
    away: float,
    merged: Array,
    tolerance: float,
    size: float,
    *,
    rank: int | None = None,
    got_rank: int = 0,
) -> None:
    """``away``: how far the result is from ``merged``; it must be as near as any of its rank (Eckart-Young)."""
    lost = 0.0 if rank is None else _norm(np.asarray(np.linalg.svd(merged, compute_uv=False)[rank:], np.float64))
    room = tolerance * _norm(merged) + CANCELLED * size
    if not away <= math.hypot(lost, room) + room or (rank is not None and got_rank > rank):
        share = away / max(_norm(merged), 1e-300)
        raise _failed(leaf, f"what '{recipe.method}' makes of it", f"{share:.2g} of its size")


def _check_core(
    leaf: str, members: Sequence[tuple[Array, Array]], bases: tuple[Array, Array], cores: Array, probes: Array
) -> None:
    """The bases are orthonormal and hold every delta; and they are singular vectors of the balanced factors side by
    side, the longest first (arXiv 2509.17786): Σ √(CᵢCᵢᵀ) and Σ √(CᵢᵀCᵢ) are diagonal and fall."""
    for basis in bases:
        small = np.resize(probes, (basis.shape[1], NUM_PROBES))
        if not _norm(basis.T @ (basis @ small) - small) <= BASIS * _norm(small):
            raise _failed(leaf, "in a core", "a basis that is not orthonormal")
    left, right = bases
    for (b, a), core in zip(members, cores, strict=True):
        away = _size(_applied((b, a), probes) - left @ (core @ (right.T @ probes)))
        if not away <= BASIS * _norm(b) * _norm(a):
            raise _failed(leaf, "in a core that holds every delta", f"{away:.2g}")
    decomposed = [np.linalg.svd(core, full_matrices=False) for core in cores]
    for spread in (sum((u * s) @ u.T for u, s, _ in decomposed), sum((v.T * s) @ v for _, s, v in decomposed)):
        along = np.diagonal(spread)
        room = BASIS * np.abs(along).max(initial=0.0)
        if np.abs(spread - np.diag(along)).max(initial=0.0) > room or np.diff(along).max(initial=0.0) > room:
            raise _failed(leaf, "in a core of principal directions", "directions that are not")


def _check_bias(recipe: Recipe, leaf: str, parts: Parts, found: LoraFactors) -> None:
    biases = [weight * f.scaling * recipe.scale * _array(f.bias) for f, weight in parts if f.bias is not None]
    got = np.zeros(1) if found.bias is None else _array(found.bias) * found.scaling
    if not _norm(got - sum(biases, np.zeros(1))) <= EXACT * sum(map(_norm, biases)):
        raise _failed(leaf, "the sum of the biases", "more than rounding")


def _applied(factors: tuple[Array, Array], probes: Array) -> Array:
    result: Array = factors[0] @ (factors[1] @ probes)
    return result


def _size(applied: Array) -> float:
    """What ‖E‖ is about, of E on the probes."""
    return _norm(applied) / math.sqrt(NUM_PROBES)


def _array(tensor: Tensor) -> Array:
    found: Array = tensor.detach().double().numpy()
    return found


def _norm(values: Array) -> float:
    return float(np.sqrt(np.square(values).sum()))


def _failed(leaf: str, what: str, by: str) -> VerificationFailed:
    return VerificationFailed(
        f"The merge of '{leaf}' is not {what}: it differs by {by}. This is a fault of Loom's, not of the inputs; "
        "please report the recipe.",
        check="method",
        leaf=leaf,
    )
