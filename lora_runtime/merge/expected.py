"""What a merge was to become, and whether an adapter is it, without the merge's own code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_runtime.combine import WeightOf, assembled, sum_factors
from lora_runtime.dense import add_into
from lora_runtime.layout import BaseLayout
from lora_runtime.merge.adapters import layers_of, weighing, weight_of
from lora_runtime.merge.recipe import EXACT, Recipe
from lora_runtime.weights import NOT_SAVED, AdapterWeights, BaseParameter

TINY = 1e-30
CANCELLED = 1e-2
"""‖ΔW‖/‖B‖‖A‖ below which deltas cancel: what is left is small beside the rounding of what was added up, and is
compared as if it were as large as this."""

Part = TypeVar("Part")


def expected_of(
    recipe: Recipe, adapters: Mapping[str, AdapterWeights], base: BaseParameter, merged: AdapterWeights
) -> AdapterWeights:
    """What ``recipe`` should make of ``adapters``, by name: for an exact method the run-time combination of them, which
    no rule and no core has a part in; for any other, ``merged`` itself, since it alone says what its method does.

    ``scale`` is that of the low-rank parts. Raises InvalidCombination for heads that cannot be added.
    """
    if recipe.method not in EXACT:
        return merged
    inputs = [(adapters[found.adapter], found) for found in recipe.inputs]
    num_layers = layers_of(leaf for adapter, _ in inputs for leaf in (*adapter.modules, *adapter.heads))
    members: list[tuple[AdapterWeights, WeightOf]] = []
    for adapter, found in inputs:
        weight = weight_of(found, num_layers)
        part = weighing(adapter, weight)
        members.append((AdapterWeights(version=adapter.version, lora=part.lora), _times(recipe.scale, weight)))
        members.append((replace(part, lora={}), weight))
    return assembled(members, base, sum_factors, version=merged.version)


def distances(one: AdapterWeights, other: AdapterWeights, layout: BaseLayout) -> dict[str, float]:
    """By leaf or head, ‖other - one‖ relative to ‖one‖ (Frobenius), however the two are put into factors and full
    weights; infinite where the one changes what the other does not. Computed in fp32; holds a leaf four times."""
    found = {leaf: _distance(one, other, layout, leaf) for leaf in sorted(one.modules | other.modules)}
    for name in sorted({*one.heads, *other.heads}):
        if name not in one.heads or name not in other.heads:
            found[name] = float("inf")
            continue
        ours, theirs = one.heads[name], other.heads[name]
        found[name] = _relative(ours.weight, theirs.weight)
        if ours.labels != theirs.labels or (ours.bias is None) != (theirs.bias is None):
            found[name] = float("inf")
        elif ours.bias is not None and theirs.bias is not None:
            found[name] = max(found[name], _relative(ours.bias, theirs.bias))
    return found


def lost_changes(
    one: AdapterWeights, other: AdapterWeights, layout: BaseLayout, base: BaseParameter
) -> dict[str, float]:
    """By leaf that ``one`` carries in full or in rows, ‖other - one‖ relative to ‖one - W₀‖ (Frobenius): what is small
    beside a weight may be much of what changed of it. Both must change such a leaf. Holds a leaf four times, in fp32.
    """
    found: dict[str, float] = {}
    for leaf in sorted({*one.saved, *one.token_rows} & other.modules):
        ours, theirs = (_change(weights, layout, leaf) for weights in (one, other))
        rows = one.token_rows.get(leaf)
        carried: dict[str, Tensor | slice] = dict.fromkeys(one.saved.get(leaf, NOT_SAVED).parameters, slice(None))
        if rows is not None:
            carried.setdefault("weight", rows.indices)
        apart = change = 0.0
        for name, at in carried.items():
            apart = math.hypot(apart, float((theirs[name][at] - ours[name][at]).norm()))
            change = math.hypot(change, float((ours[name][at] - base(leaf, name)[at].float()).norm()))
        found[leaf] = apart / max(change, TINY) if apart else 0.0
    return found


class _Leaf(nn.Module):
    """A leaf that holds nothing, under its name, so that what adapters add to it is all there is to see."""

    def __init__(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        node: nn.Module = self
        for part in name.split("."):
            node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        for parameter, shape in shapes.items():
            node.register_parameter(parameter, nn.Parameter(torch.zeros(shape), requires_grad=False))

    def get_output_embeddings(self) -> None:
        return None


def _distance(one: AdapterWeights, other: AdapterWeights, layout: BaseLayout, leaf: str) -> float:
    if leaf not in one.modules or leaf not in other.modules:
        return float("inf")
    ours, theirs = (_change(weights, layout, leaf) for weights in (one, other))
    factors = one.lora.get(leaf)
    size = 0.0 if factors is None else abs(factors.scaling) * float(factors.a.norm()) * float(factors.b.norm())
    for name in {*ours, *theirs}:  # PEFT gives all low-rank parts a bias or none, so that some are zero
        ours.setdefault(name, torch.zeros_like(theirs.get(name, ours["weight"])))
        theirs.setdefault(name, torch.zeros_like(ours[name]))
    return max(_relative(ours[name], theirs[name], CANCELLED * size if name == "weight" else 0.0) for name in ours)


def _change(weights: AdapterWeights, layout: BaseLayout, leaf: str) -> dict[str, Tensor]:
    only = AdapterWeights(
        version=weights.version,
        lora=_at(leaf, weights.lora),
        saved=_at(leaf, weights.saved),
        token_rows=_at(leaf, weights.token_rows),
    )
    holder = _Leaf(leaf, layout.leaves[leaf].parameters)
    add_into(holder, only)
    return {name.rpartition(".")[2]: parameter.detach() for name, parameter in holder.named_parameters()}


def _at(leaf: str, parts: Mapping[str, Part]) -> dict[str, Part]:
    return {leaf: parts[leaf]} if leaf in parts else {}


def _relative(one: Tensor, other: Tensor, size: float = 0.0) -> float:
    if one.shape != other.shape:
        return float("inf")
    apart = float((one.float() - other.float()).norm())
    return apart / max(float(one.float().norm()), size, TINY) if apart else 0.0


def _times(scale: float, weight: WeightOf) -> WeightOf:
    return lambda leaf: scale * weight(leaf)
