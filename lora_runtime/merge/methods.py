"""What is known of merge methods without their arithmetic: options, conventions, semantics. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Convention = Literal["mergekit", "peft"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Of a recipe, for the rules that have them.

    ``density``: the share of entries that stay. ``epsilon``: DELLA's spread of it. ``gamma``: the share of largest
    entries that breadcrumbs drop. ``convention``: whose TIES it is: mergekit elects signs after weighting and divides
    by the weights of those that agree; PEFT elects before and divides by their number.
    """

    density: float = 0.5
    epsilon: float = 0.2
    gamma: float = 0.01
    convention: Convention = "mergekit"


SEMANTICS: Mapping[str, int] = MappingProxyType(
    {
        "linear": 1,
        "magnitude_prune": 1,
        "ties": 1,
        "dare_linear": 1,
        "dare_ties": 1,
        "della": 1,
        "breadcrumbs": 1,
        "tsv": 1,
        "iso_c": 1,
        "robust_merge": 1,
        "karcher": 1,
    }
)
"""By rule: a number that grows when the same recipe would give another result."""
