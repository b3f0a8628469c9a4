"""Several adapters made into one, in memory: low-rank parts by the recipe's method, all else as a sum of deltas.

No base weights are needed, but for what adapters carry in full (saved modules, token rows), which merge as
W₀ + Σ wᵢ (Wᵢ - W₀) whatever the method. The result does not depend on the order of the inputs, nor on which leaves are
merged together: what is random follows from the seed and the leaf's name.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TypeVar

import torch
from torch import Generator, Tensor

from lora_runtime.combine import WeightOf, assembled, sum_biases, sum_factors
from lora_runtime.errors import InvalidCombination
from lora_runtime.merge.agreement import check_leaf
from lora_runtime.merge.recipe import Input, Recipe, layer_of
from lora_runtime.merge.rules import RULES
from lora_runtime.merge.spaces import Core, Factors, core_of, truncated
from lora_runtime.weights import AdapterWeights, BaseParameter, LoraFactors

Parts = Sequence[tuple[LoraFactors, float]]
Part = TypeVar("Part")


@dataclass(frozen=True, slots=True, kw_only=True)
class LeafReport:
    """What became of one leaf's low-rank parts. ``energy``: the share of the merged delta's squared norm that the
    result's rank keeps. Norms are Frobenius'. ``is_checked``: against the method's independent statement."""

    inputs: int
    rank: int
    energy: float
    norm: float
    is_checked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """The adapter, and what was measured of each leaf."""

    weights: AdapterWeights
    leaves: Mapping[str, LeafReport] = field(default_factory=dict)


def merge(
    recipe: Recipe,
    adapters: Mapping[str, AdapterWeights],
    base: BaseParameter,
    *,
    num_layers: Mapping[str, int] | None = None,
) -> Merged:
    """``adapters`` by the names that the recipe's inputs have. Raises InvalidCombination.

    Adds in fp32 or better, and rounds nothing: the result's tensors are fp32. ``num_layers``: of each stack, as
    :func:`layers_of` counts them, where ``adapters`` are only some leaves of the recipe's.
    """
    if missing := [found.adapter for found in recipe.inputs if found.adapter not in adapters]:
        raise InvalidCombination(f"There is no adapter '{missing[0]}' to merge.")
    # By content, so that rules which draw or add in turn do the same whatever order the recipe has.
    members = sorted(((adapters[i.adapter], i) for i in recipe.inputs), key=lambda member: member[0].version)
    if num_layers is None:
        num_layers = layers_of(leaf for adapter, _ in members for leaf in (*adapter.modules, *adapter.heads))
    reports: dict[str, LeafReport] = {}

    def merge_factors(leaf: str, parts: Parts) -> LoraFactors:
        found, reports[leaf] = merge_leaf(recipe, leaf, parts)
        return found

    weighed = [(adapter, weight_of(found, num_layers)) for adapter, found in members]
    weights = assembled(
        [(weighing(adapter, weight_at), weight_at) for adapter, weight_at in weighed],
        base,
        merge_factors,
        version=recipe.version({found.adapter: adapter.version for adapter, found in members}),
    )
    return Merged(weights=weights, leaves=reports)


def generator_of(seed: int, leaf: str) -> Generator:
    """What is random about one leaf, the same wherever and whenever it is merged."""
    digest = hashlib.blake2b(f"{seed}/{leaf}".encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def merge_leaf(recipe: Recipe, leaf: str, parts: Parts) -> tuple[LoraFactors, LeafReport]:
    """One leaf's low-rank parts, in the order of their adapters' versions, as one. Raises InvalidCombination, and
    VerificationFailed where the result is not what an independent statement of the method says."""
    _check_shapes(leaf, parts)
    core: Core | None = None
    if recipe.method == "cat":
        found, energy = sum_factors(leaf, [(factors, weight * recipe.scale) for factors, weight in parts]), 1.0
    else:
        (b, a), energy, core = _by_rule(recipe, leaf, parts)
        biases = sum_biases([(factors, weight * recipe.scale) for factors, weight in parts])
        found = LoraFactors(a=a, b=b, scaling=1.0, kind=parts[0][0].kind, bias=biases)
    is_checked = check_leaf(recipe, leaf, parts, found, core)
    norm = _norm(found.b, found.a)
    report = LeafReport(inputs=len(parts), rank=found.rank, energy=energy, norm=norm, is_checked=is_checked)
    return found, report


def _by_rule(recipe: Recipe, leaf: str, parts: Parts) -> tuple[Factors, float, Core | None]:
    members = [(factors.b.float() * factors.scaling, factors.a.float()) for factors, _ in parts]
    weights = torch.tensor([weight for _, weight in parts], dtype=torch.float64)
    generator = generator_of(recipe.seed, leaf)
    rule = RULES[recipe.rule]
    rank = recipe.rank
    if rank is None and recipe.method == "svd":
        rank = max(factors.rank for factors, _ in parts)
    if recipe.space == "core" or not rule.is_elementwise:
        core = core_of(members)
        merged = rule.apply(core.cores_TPQ, weights, recipe.options, generator)
        return *core.factors(merged * recipe.scale, rank), core
    dense = torch.stack([b @ a for b, a in members])
    merged = rule.apply(dense, weights.float(), recipe.options, generator)
    return *truncated(merged * recipe.scale, rank or min(dense.shape[1:])), None


def weight_of(found: Input, num_layers: Mapping[str, int]) -> WeightOf:
    """What an input weighs, by leaf. ``num_layers``: of each stack."""

    @cache
    def weight_at(leaf: str) -> float:
        place = layer_of(leaf)
        return found.weight_at(leaf, 0 if place is None else num_layers[place[0]])

    return weight_at


def weighing(adapter: AdapterWeights, weight_at: WeightOf) -> AdapterWeights:
    """What of ``adapter`` takes part: all leaves and heads where its weight is not 0."""
    return replace(
        adapter,
        lora=_where(adapter.lora, weight_at),
        saved=_where(adapter.saved, weight_at),
        token_rows=_where(adapter.token_rows, weight_at),
        heads=_where(adapter.heads, weight_at),
    )


def _where(parts: Mapping[str, Part], weight_at: WeightOf) -> dict[str, Part]:
    return {name: part for name, part in parts.items() if weight_at(name)}


def layers_of(leaves: Iterable[str]) -> dict[str, int]:
    """How many layers each stack has, as far as ``leaves`` reach."""
    found: dict[str, int] = {}
    for leaf in leaves:
        if (place := layer_of(leaf)) is not None:
            found[place[0]] = max(found.get(place[0], 0), place[1] + 1)
    return found


def _check_shapes(leaf: str, parts: Parts) -> None:
    shapes = {(factors.kind, factors.b.shape[0], factors.a.shape[1]) for factors, _ in parts}
    if len(shapes) > 1:
        said = ", ".join(f"{rows} x {columns}" for _, rows, columns in sorted(shapes))
        raise InvalidCombination(f"The adapters change '{leaf}' as matrices of different shapes: {said}.", leaf=leaf)


def _norm(b: Tensor, a: Tensor) -> float:
    """‖B·A‖, without the product: ‖BA‖² = tr((BᵀB)(AAᵀ))."""
    b, a = b.double(), a.double()
    return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))
