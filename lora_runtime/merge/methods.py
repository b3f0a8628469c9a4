"""What is known of merge methods without their arithmetic: options, conventions, semantics. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

_RANDOM = ("dare_linear", "dare_ties", "della")
_ENTRIES = ("magnitude_prune", "ties", *_RANDOM, "breadcrumbs", "robust_merge")
METHODS_OF: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "density": _ENTRIES,
        "space": _ENTRIES,
        "epsilon": ("della",),
        "gamma": ("breadcrumbs",),
        "convention": ("ties", *_RANDOM),
        "seed": _RANDOM,
    }
)
"""By option of a recipe: the methods that it has an effect on."""

Convention = Literal["loom", "mergekit", "peft"]
"""Whose meaning a method's name has, where tools differ (mergekit 0.1.5, PEFT 0.21).

TIES and its kin, of trimmed deltas D̂ᵢ with weights wᵢ, entry by entry:

- ``loom``: γ = sgn Σ wᵢD̂ᵢ is elected, and Σ wᵢD̂ᵢ of those whose wᵢD̂ᵢ has that sign is divided by their Σ|wᵢ|. With
  positive weights that is the paper's mean, weighted; a negative weight votes and adds with the delta turned round, so
  that all weights negated negate the result, and no entry is larger than the largest D̂ᵢ. Weights are shares of a mean:
  times a constant they change nothing, one adapter alone is sgn(w)·D̂ whatever the size of its weight, and where only
  one adapter has an entry, that entry stays whole. So an adapter with a small weight is not nearly absent; one with
  weight 0 is. Votes of both signs that cancel as far as fp32 can tell elect none, as sgn 0 = 0 in the paper: the entry
  is 0.
- ``mergekit``: as ``loom``, but that a tie elects plus, and that its ``dare_ties`` adds up without dividing. mergekit
  divides by the signed Σwᵢ, which turns one negative weight round and grows without bound where weights of both signs
  cancel; so ``ties`` and ``della`` of this convention take no negative weights.
- ``peft``: signs are elected by ΣD̂ᵢ, before weighting, a tie elects plus, and what agrees is divided by how many agree.
  Finite for weights of either sign. (An adapter of weight 0, which PEFT counts, has no part here either.) PEFT has no
  ``della``.

What is dropped at random is made up for by the density, so that the expectation stays; in mergekit, by the ratio of L1
norms. DELLA's densities spread over ±ε/2 as in its paper; in mergekit, over ±ε.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Of a recipe, for the rules that have them.

    ``density``: the share of entries that stay. ``epsilon``: DELLA's spread of it. ``gamma``: the share of largest
    entries that breadcrumbs drop. ``convention``: see :data:`Convention`.
    """

    density: float = 0.5
    epsilon: float = 0.2
    gamma: float = 0.01
    convention: Convention = "loom"


SEMANTICS: Mapping[str, int] = MappingProxyType(
    {
        "linear": 2,
        "magnitude_prune": 2,
        "ties": 2,
        "dare_linear": 3,
        "dare_ties": 3,
        "della": 3,
        "breadcrumbs": 2,
        "tsv": 2,
        "iso_c": 2,
        "robust_merge": 2,
        "karcher": 2,
    }
)
"""By rule: a number that grows when the same recipe would give another result."""
FULL_SEMANTICS = 2
"""The same of what adapters carry in full, which merges alike under every rule. 2: what PEFT merges stays in fp32."""
