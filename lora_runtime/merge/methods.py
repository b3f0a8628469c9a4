"""What is known of merge methods without their arithmetic: options, conventions, semantics. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Convention = Literal["loom", "mergekit", "peft"]
"""Whose meaning a method's name has, where tools differ (mergekit 0.1.5, PEFT 0.21).

TIES and its kin: PEFT elects signs before weighting and divides by how many agree; mergekit and ``loom`` elect after
it, and divide by the weights of those that agree, but that mergekit's ``dare_ties`` does not divide. What is dropped at
random is made up for by the density, so that the expectation stays; in mergekit, by the ratio of L1 norms. DELLA's
densities spread over ±ε/2 as in its paper; in mergekit, over ±ε.
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
        "linear": 1,
        "magnitude_prune": 1,
        "ties": 1,
        "dare_linear": 2,
        "dare_ties": 2,
        "della": 2,
        "breadcrumbs": 1,
        "tsv": 1,
        "iso_c": 1,
        "robust_merge": 1,
        "karcher": 1,
    }
)
"""By rule: a number that grows when the same recipe would give another result."""
FULL_SEMANTICS = 2
"""The same of what adapters carry in full, which merges alike under every rule. 2: what PEFT merges stays in fp32."""
