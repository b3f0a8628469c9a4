"""How a recipe's deltas relate, leaf by leaf: whether they cancel, are one up to a factor, or share directions.

All of it follows from inner products of deltas, which follow from their factors: no dense matrix is made.

Shape legend: T adapters, R the sum of their ranks.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_runtime.layout import BaseLayout
from lora_runtime.merge.inputs import Inputs
from lora_runtime.merge.methods import METHODS_OF
from lora_runtime.merge.recipe import Recipe
from lora_runtime.merge.rules import DEPENDENT, independence
from lora_runtime.merge.spaces import core_of
from lora_runtime.names import listed
from lora_runtime.weights import LoraFactors

CANCELS, NOTHING_LEFT = 1e-3, 1e-6
"""‖Σ wᵢDᵢ‖ / Σ |wᵢ|·‖Dᵢ‖ below which deltas cancel, and below which what is left is rounding."""
ONE = 1e-6
"""How far |cos| of two deltas is from 1 at most, for one to be the other times a number."""
NEARLY = 1e-2
"""Singular values of directions side by side below which ``tsv`` makes much of little."""
FLOPS = 4e10
"""What a look at a recipe's leaves may cost; of larger merges it sees some leaves."""


@dataclass(frozen=True, slots=True)
class _Pair:
    one: str
    other: str
    factor: float
    """The other is the one times this."""


@dataclass(slots=True)
class Relations:
    """What was seen. ``left``: by leaf, ‖Σ wᵢDᵢ‖ / Σ |wᵢ|·‖Dᵢ‖. ``opposed``: leaves of opposite directions.
    ``independence``: by leaf, where it was asked for. ``num_leaves``: with low-rank parts of two adapters or more."""

    num_leaves: int = 0
    left: dict[str, float] = field(default_factory=dict)
    pairs: dict[str, list[_Pair]] = field(default_factory=dict)
    opposed: list[str] = field(default_factory=list)
    independence: dict[str, float] = field(default_factory=dict)


def relations(recipe: Recipe, inputs: Inputs, layout: BaseLayout, ranks: Mapping[str, Sequence[int]]) -> Relations:
    """Of the leaves where at least two adapters have low-rank parts; ``ranks``: of those, by leaf. Leaves are looked at
    in an order that their names decide, until FLOPS are spent."""
    found = Relations()
    shared = {leaf: sum(each) for leaf, each in ranks.items() if len(each) > 1}
    spent = 0.0
    for leaf in sorted(shared, key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest()):
        found.num_leaves += 1
        shape = layout.leaves[leaf]
        spent += 2.0 * shared[leaf] ** 2 * (shape.in_features + shape.out_features)
        if spent <= FLOPS and len(parts := inputs.parts(leaf)) > 1:
            _look(recipe, leaf, parts, found)
    return found


def problems_of(recipe: Recipe, found: Relations, *, is_all: bool) -> list[str]:
    """What makes the merge pointless or undefined. ``is_all``: whether the adapters change nothing but those leaves."""
    problems = []
    if recipe.method in ("slerp", "karcher") and found.opposed:
        problems.append(
            f"In {len(found.opposed)} of {found.num_leaves} modules the deltas are opposite "
            f"({listed(found.opposed, 3)}), and '{recipe.method}' has no mean there. Merge by 'linear', or leave one "
            "of the adapters out of them with weight 0."
        )
    worst = max(found.left.values(), default=1.0)
    is_random = recipe.method in METHODS_OF["seed"]
    if is_all and len(found.left) == found.num_leaves and worst < NOTHING_LEFT and not is_random:
        problems.append(
            f"The weighted deltas cancel in all {found.num_leaves} modules (what is left is at most {worst:.1g} of "
            "what is added up), so that the result would be the base."
        )
    return problems


def warnings_of(recipe: Recipe, found: Relations) -> list[str]:
    """What is odd, with numbers; nothing if nothing is."""
    warnings, seen = [], len(found.left)
    if cancelled := {leaf: left for leaf, left in found.left.items() if left < CANCELS}:
        worst = min(cancelled, key=lambda leaf: (cancelled[leaf], leaf))
        warnings.append(
            f"The weighted deltas cancel in {len(cancelled)} of {seen} modules, most of all in {worst}: what is left "
            f"is {cancelled[worst]:.1g} of what is added up, where rounding is about {NOTHING_LEFT:.0e}."
        )
    counts = Counter((pair.one, pair.other) for pairs in found.pairs.values() for pair in pairs)
    for (one, other), count in counts.items():
        factors = [p.factor for pairs in found.pairs.values() for p in pairs if (p.one, p.other) == (one, other)]
        low, high = min(factors), max(factors)
        shown = f"{low:.3g}" if math.isclose(low, high, rel_tol=1e-3) else f"{low:.3g} to {high:.3g}"
        warnings.append(
            f"'{other}' is '{one}' times {shown} in {count} of {seen} modules: they are one change, counted twice."
        )
    near = {leaf: value for leaf, value in found.independence.items() if value < NEARLY}
    if near:
        worst = min(near, key=lambda leaf: (near[leaf], leaf))
        dependent = sum(value < DEPENDENT for value in near.values())
        warnings.append(
            f"'{recipe.method}' makes the adapters' directions orthogonal, and in {len(near)} of {seen} modules they "
            f"are hardly independent (smallest singular value side by side {near[worst]:.1g} of the largest, in "
            f"{worst}): what they share is averaged in {dependent} modules, and small differences are blown up in "
            f"{len(near) - dependent}. 'svd' or 'linear' adds them up."
        )
    return warnings


def bias_warnings(recipe: Recipe, inputs: Inputs, layout: BaseLayout, ranks: Mapping[str, Sequence[int]]) -> list[str]:
    """Of ``lora_bias``, which PEFT gives all low-rank parts or none, where the base has no bias."""
    parts = {leaf: inputs.parts(leaf) for leaf, place in inputs.places if place == "bias" and leaf in ranks}
    if not any(factors.bias is not None for each in parts.values() for factors, _ in each.values()):
        return []
    bare = sorted(leaf for leaf in ranks if "bias" not in layout.leaves[leaf].parameters)
    if not bare:
        return []
    return [
        f"The merged adapter has lora_bias, since an input has, also on {len(bare)} modules that have no bias in the "
        f"base ({listed(bare, 3)}). PEFT runs it, but PEFT's merge_and_unload refuses such modules: serve it as an "
        "adapter."
    ]


def _look(recipe: Recipe, leaf: str, parts: Mapping[str, tuple[LoraFactors, float]], found: Relations) -> None:
    names = list(parts)
    weights_T = torch.tensor([weight for _, weight in parts.values()], dtype=torch.float64)
    gram_TT = _inner_products([factors for factors, _ in parts.values()])
    norms_T = gram_TT.diagonal().clamp(min=0).sqrt()
    whole = float(weights_T.abs() @ norms_T)
    left = math.sqrt(max(0.0, float(weights_T @ gram_TT @ weights_T)))
    found.left[leaf] = left / whole if whole else 1.0
    for i, one in enumerate(names):
        for j in range(i + 1, len(names)):
            size = float(norms_T[i] * norms_T[j])
            cosine = float(gram_TT[i, j]) / size if size else 0.0
            if abs(cosine) > 1 - ONE:
                factor = math.copysign(float(norms_T[j] / norms_T[i]), cosine)
                found.pairs.setdefault(leaf, []).append(_Pair(one, names[j], factor))
                if cosine < 0:
                    found.opposed.append(leaf)
    if recipe.rule == "tsv":
        core = core_of([(factors.b.float() * factors.scaling, factors.a.float()) for factors, _ in parts.values()])
        found.independence[leaf] = independence(core.cores_TPQ)


def _inner_products(members: Sequence[LoraFactors]) -> Tensor:
    """⟨Dᵢ, Dⱼ⟩ = sᵢsⱼ·Σ (BᵢᵀBⱼ ∘ AᵢAⱼᵀ), in fp64."""
    b = torch.cat([factors.b.double() * factors.scaling for factors in members], dim=1)
    a = torch.cat([factors.a.double() for factors in members])
    products_RR = (b.T @ b) * (a @ a.T)
    ranks = [factors.rank for factors in members]
    return torch.stack(
        [torch.stack([block.sum() for block in rows.split(ranks, dim=1)]) for rows in products_RR.split(ranks)]
    )
