"""A recipe's adapters, opened: what they make of each parameter of a base, and the adapter that they make together.

Both are made a few leaves at a time, and do not depend on which leaves those are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cached_property

import torch

from lora_runtime.checkpoint import OpenedAdapter
from lora_runtime.combine import WeightOf, sum_biases
from lora_runtime.layout import BaseLayout
from lora_runtime.merge.adapters import LeafReport, Merged, layers_of, merge, merge_leaf, weight_of
from lora_runtime.merge.changes import Change, Place
from lora_runtime.merge.recipe import Recipe
from lora_runtime.weights import NOT_SAVED, AdapterWeights, BaseParameter, LoraFactors, TokenRows


class Inputs:
    """Implements :class:`lora_runtime.merge.changes.Changes`. Not safe for several threads at once.

    ``leaves`` has a report of every leaf whose low-rank parts were merged so far.
    """

    def __init__(
        self, recipe: Recipe, opened: Mapping[str, OpenedAdapter], base: BaseParameter, layout: BaseLayout
    ) -> None:
        """``opened``: by the names that the recipe's inputs have."""
        self._recipe = recipe
        self._opened = opened
        self._base = base
        self._layout = layout
        every = [leaf for adapter in opened.values() for leaf in (*adapter.modules, *adapter.heads)]
        self._num_layers = layers_of(every)
        # By content: an order that the recipe's own does not change.
        members = sorted(((opened[found.adapter], found) for found in recipe.inputs), key=lambda m: m[0].version)
        self._weights = {found.adapter: weight_of(found, self._num_layers) for found in recipe.inputs}
        self._members: list[tuple[OpenedAdapter, WeightOf]] = [
            (adapter, self._weights[found.adapter]) for adapter, found in members
        ]
        self.leaves: dict[str, LeafReport] = {}

    @property
    def version(self) -> str:
        """Identity of the result: see :meth:`lora_runtime.merge.recipe.Recipe.version`."""
        return self._recipe.version({name: adapter.version for name, adapter in self._opened.items()})

    @cached_property
    def places(self) -> frozenset[Place]:
        """Every parameter that changes: those where some adapter's weight is not 0. A tied head whose change is its
        embedding's is not among them: it has no tensor of its own, and follows."""
        found = frozenset(place for adapter, of in self._members for place in adapter.places if of(place[0]))
        return found - {(head, "weight") for head in self._layout.tied if head not in self.torn}

    @cached_property
    def torn(self) -> list[str]:
        """Tied heads that are to become other than their embeddings, which a checkpoint of this base cannot hold."""
        return [head for head in self._layout.tied if not self._is_tied(head)]

    def merged(self, leaves: Collection[str] | None = None, *, with_heads: bool = True) -> Merged:
        """The adapter that the recipe makes, or what it does to ``leaves`` alone."""
        weights = {
            name: replace(adapter.weights(leaves), heads=adapter.heads if with_heads else {})
            for name, adapter in self._opened.items()
        }
        return merge(self._recipe, weights, self._base, num_layers=self._num_layers)

    def parts(self, leaf: str) -> dict[str, tuple[LoraFactors, float]]:
        """Low-rank parts of a leaf and their weights, where those are not 0, by the inputs' names."""
        return {
            name: (adapter.weights({leaf}).lora[leaf], weight)
            for name, adapter in sorted(self._opened.items(), key=lambda item: item[1].version)
            if leaf in adapter.ranks and (weight := self.weight(name, leaf))
        }

    def weight(self, name: str, leaf: str) -> float:
        """Of the input ``name`` at a leaf or head."""
        return self._weights[name](leaf)

    def at(self, place: Place) -> Change:
        leaf, parameter = place
        there = [(adapter, of(leaf)) for adapter, of in self._members if leaf in adapter.modules and of(leaf)]
        members = [(adapter.weights({leaf}), weight) for adapter, weight in there]
        carried = [(member.saved.get(leaf, NOT_SAVED).parameters.get(parameter), weight) for member, weight in members]
        full = tuple((tensor, weight) for tensor, weight in carried if tensor is not None)
        parts = [(member.lora[leaf], weight) for member, weight in members if leaf in member.lora]
        if parameter != "weight":
            bias = sum_biases([(factors, weight * self._recipe.scale) for factors, weight in parts])
            return Change(full=full, shifts=() if bias is None or parameter != "bias" else ((bias, 1.0),))
        rows = tuple((member.token_rows[leaf], weight) for member, weight in members if leaf in member.token_rows)
        if not parts:
            return Change(full=full, rows=rows)
        factors, self.leaves[leaf] = merge_leaf(self._recipe, leaf, parts)
        return Change(full=full, rows=rows, factors=factors)

    def _is_tied(self, head: str) -> bool:
        """Whether every adapter does to ``head`` what it does to the embedding that it is tied to."""
        embedding = self._layout.tied[head]
        ends = {head, embedding}
        return all(
            of(head) == of(embedding) and _same(adapter.weights(ends), head, embedding)
            for adapter, of in self._members
            if ends & adapter.modules
        )


def _same(weights: AdapterWeights, head: str, embedding: str) -> bool:
    """Whether the two ends of a tied weight are changed alike."""
    saved = [weights.saved.get(leaf, NOT_SAVED).parameters.get("weight") for leaf in (head, embedding)]
    rows = [weights.token_rows.get(leaf) for leaf in (head, embedding)]
    lora = [weights.lora.get(leaf) for leaf in (head, embedding)]
    if any((one is None) != (other is None) for one, other in (saved, rows, lora)):
        return False
    (own, other), (own_rows, other_rows), (factors, of_embedding) = saved, rows, lora
    if own is not None and other is not None and not torch.equal(own, other):
        return False
    if own_rows is not None and other_rows is not None and not _same_rows(own_rows, other_rows):
        return False
    if factors is None or of_embedding is None:
        return True
    # The head's ΔW is the embedding's: (B·A)ᵀ = Aᵀ·Bᵀ.
    return (
        of_embedding.kind == "embedding"
        and factors.scaling == of_embedding.scaling
        and torch.equal(factors.b, of_embedding.a.T)
        and torch.equal(factors.a, of_embedding.b.T)
    )


def _same_rows(one: TokenRows, other: TokenRows) -> bool:
    return torch.equal(one.indices, other.indices) and torch.equal(one.rows, other.rows)
