"""Combinations as one adapter: exact sums of deltas.

For members i with weights wᵢ the result does base + Σ wᵢ·Δᵢ on every leaf: LoRA factors are
concatenated along the rank (ΔW = Σ wᵢ sᵢ Bᵢ Aᵢ), saved parameters and token rows become
W₀ + Σ wᵢ (Wᵢ - W₀). Everything is folded in fp32. Where members train tokens of a leaf that others
save or adapt, the rows go into that weight, or become ranks of their own.

An engine needs none of this: a row carries weights over slots. It is for writing a combination
to disk, and for engines that know one adapter per row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from lora_runtime.errors import InvalidCombination
from lora_runtime.weights import NOT_SAVED, AdapterWeights, BaseParameter, Head, LoraFactors, SavedModule, TokenRows

Member = tuple[AdapterWeights, float]
WeightOf = Callable[[str], float]
"""The weight of an adapter at a leaf or a head, by its name."""

Part = TypeVar("Part")


def combine(members: Sequence[Member], base: BaseParameter) -> AdapterWeights:
    """One adapter equal to the weighted sum of ``members``. Raises InvalidCombination.

    A head has no base to differ from, so heads add as Σ wᵢ Wᵢ; their labels must agree.
    """
    check_weights([weight for _, weight in members])
    return assembled(
        [(adapter, _everywhere(weight)) for adapter, weight in members],
        base,
        sum_factors,
        version=combined_version([(adapter.version, weight) for adapter, weight in members]),
    )


def assembled(
    members: Sequence[tuple[AdapterWeights, WeightOf]],
    base: BaseParameter,
    merge_factors: Callable[[str, Sequence[tuple[LoraFactors, float]]], LoraFactors],
    *,
    version: str,
) -> AdapterWeights:
    """One adapter of several, with weights by leaf, whose low-rank parts ``merge_factors`` makes into one.

    All that is carried in full is added up: W₀ + Σ wᵢ (Wᵢ - W₀). Raises InvalidCombination.
    """
    lora = _each_leaf(members, "lora", merge_factors)
    saved = _each_leaf(members, "saved", lambda name, parts: _sum_saved(name, parts, base))
    rows = _each_leaf(members, "token_rows", lambda name, parts: _sum_rows(name, parts, base))
    for name in [name for name in rows if "weight" in saved.get(name, NOT_SAVED).parameters or name in lora]:
        own = base(name, "weight")[rows[name].indices].float()
        change = rows[name].rows - own
        if "weight" in saved.get(name, NOT_SAVED).parameters:
            saved[name].parameters["weight"][rows[name].indices] += change  # a fresh tensor, from _blend
        else:
            lora[name] = _with_rows(lora[name], rows[name].indices, change)
        del rows[name]
    return AdapterWeights(
        version=version,
        lora=lora,
        saved=saved,
        token_rows=rows,
        heads=_each_leaf(members, "heads", sum_heads),
    )


def check_weights(weights: Sequence[float]) -> None:
    """Raise InvalidCombination unless there is at least one weight and all are finite."""
    if not weights:
        raise InvalidCombination("A combination needs at least one adapter.")
    for weight in weights:
        if not math.isfinite(weight):
            raise InvalidCombination(f"The weight {weight} is not a finite number.", weight=str(weight))


def combined_version(members: Sequence[tuple[str, float]]) -> str:
    """Identity of a combination: sha256 over its members' versions and weights, in hex, whatever their order."""
    recipe = "+".join(f"{version}:{float(weight).hex()}" for version, weight in sorted(members))
    return hashlib.sha256(recipe.encode()).hexdigest()


def sum_heads(name: str, parts: Sequence[tuple[Head, float]]) -> Head:
    """Σ wᵢ Wᵢ of heads with equal labels. Raises InvalidCombination where the labels differ."""
    if len(parts) == 1 and parts[0][1] == 1.0:
        return parts[0][0]
    labels = parts[0][0].labels
    if any(head.labels != labels for head, _ in parts):
        raise InvalidCombination(f"The adapters' heads '{name}' have different labels and cannot be combined.")
    biases = [(head.bias, weight) for head, weight in parts if head.bias is not None]
    return Head(
        name=name,
        weight=_weighted_sum([(head.weight, weight) for head, weight in parts]),
        bias=_weighted_sum(biases) if biases else None,
        labels=labels,
    )


def _each_leaf(
    members: Sequence[tuple[AdapterWeights, WeightOf]],
    kind: str,
    merge: Callable[[str, Sequence[tuple[Part, float]]], Part],
) -> dict[str, Part]:
    collected: dict[str, list[tuple[Part, float]]] = {}
    for adapter, weight_of in members:
        for name, part in getattr(adapter, kind).items():
            collected.setdefault(name, []).append((part, weight_of(name)))
    return {name: merge(name, parts) for name, parts in collected.items()}


def _everywhere(weight: float) -> WeightOf:
    return lambda _: weight


def sum_biases(parts: Sequence[tuple[LoraFactors, float]]) -> Tensor | None:
    """Σ wᵢ sᵢ bᵢ of the LoRA biases, where there are any."""
    biases = [(f.bias, weight * f.scaling) for f, weight in parts if f.bias is not None]
    return _weighted_sum(biases) if biases else None


def sum_factors(_: str, parts: Sequence[tuple[LoraFactors, float]]) -> LoraFactors:
    """Σ wᵢ sᵢ Bᵢ Aᵢ exactly: ranks side by side."""
    return LoraFactors(
        a=torch.cat([f.a.float() for f, _ in parts]),
        b=torch.cat([f.b.float() * (weight * f.scaling) for f, weight in parts], dim=1),
        scaling=1.0,
        kind=parts[0][0].kind,
        bias=sum_biases(parts),
    )


def _sum_saved(name: str, parts: Sequence[tuple[SavedModule, float]], base: BaseParameter) -> SavedModule:
    parameters: dict[str, list[tuple[Tensor, float]]] = {}
    for module, weight in parts:
        for parameter, tensor in module.parameters.items():
            parameters.setdefault(parameter, []).append((tensor, weight))
    return SavedModule(
        parameters={parameter: _blend(base(name, parameter), tensors) for parameter, tensors in parameters.items()}
    )


def _sum_rows(name: str, parts: Sequence[tuple[TokenRows, float]], base: BaseParameter) -> TokenRows:
    if len(parts) == 1 and parts[0][1] == 1.0:  # itself, as in _blend
        only = parts[0][0]
        order = only.indices.argsort()
        return TokenRows(indices=only.indices[order], rows=only.rows[order].float())
    indices = torch.cat([rows.indices for rows, _ in parts]).unique()
    own = base(name, "weight")[indices].float()
    total = own.clone()
    for rows, weight in parts:
        at = torch.searchsorted(indices, rows.indices)
        total[at] += weight * (rows.rows.float() - own[at])
    return TokenRows(indices=indices, rows=total)


def _with_rows(factors: LoraFactors, indices: Tensor, change: Tensor) -> LoraFactors:
    """``factors`` with ``change`` (N, D) of the weight's rows ``indices`` (N,) added: one rank per row.

    ΔW[i] += change[i] is Eᵀ·change with E the (N, V) selection of rows.
    """
    rows_of = factors.a.shape[1] if factors.kind == "embedding" else factors.b.shape[0]
    selection = torch.nn.functional.one_hot(indices, rows_of).float()
    a, b = (selection, change.T) if factors.kind == "embedding" else (change, selection.T)
    return replace(factors, a=torch.cat([factors.a, a]), b=torch.cat([factors.b, b], dim=1))


def _blend(own: Tensor, tensors: Sequence[tuple[Tensor, float]]) -> Tensor:
    """A fresh tensor. One alone in full weight is itself, not W₀ + (W - W₀), whose last bit may be another."""
    if len(tensors) == 1 and tensors[0][1] == 1.0:
        return tensors[0][0].to(torch.float32, copy=True)
    own = own.float()
    return own + _weighted_sum([(tensor.float() - own, weight) for tensor, weight in tensors])


def _weighted_sum(tensors: Sequence[tuple[Tensor, float]]) -> Tensor:
    return torch.stack([tensor.float() * weight for tensor, weight in tensors]).sum(0)
