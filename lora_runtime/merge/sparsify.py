"""Which entries of a delta are kept before deltas are merged. Each function gives a tensor of the shape it took.

Shape legend: M rows, N columns. ``density`` is the share of entries that stay, in (0, 1].
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def magnitude(delta_MN: Tensor, density: float) -> Tensor:
    """The ⌊density·M·N⌋ entries of largest magnitude (Yadav et al. 2023, arXiv 2306.01708, "trim")."""
    kept = int(density * delta_MN.numel())
    if kept >= delta_MN.numel():
        return delta_MN
    mask = torch.zeros(delta_MN.numel(), dtype=torch.bool)
    mask[torch.topk(delta_MN.abs().flatten(), kept).indices] = True
    return delta_MN * mask.view_as(delta_MN)


def random(delta_MN: Tensor, density: float, generator: Generator, *, by_norm: bool = False) -> Tensor:
    """Each entry with probability ``density``, over ``density`` (DARE: Yu et al. 2023, arXiv 2311.03099).

    The expectation is the delta itself. ``by_norm``: scaled to the L1 norm that was there instead, as mergekit does.
    """
    if density >= 1:
        return delta_MN
    mask = torch.rand(delta_MN.shape, generator=generator, dtype=torch.float64) < density
    return _to_norm(delta_MN, mask) if by_norm else delta_MN * mask / density


def ranked(
    delta_MN: Tensor, density: float, epsilon: float, generator: Generator, *, by_norm: bool = False
) -> Tensor:
    """Each entry with a probability pᵢ that rises from density − ε/2 to density + ε/2 with its magnitude's rank in its
    row, over pᵢ (DELLA's MagPrune: Deep et al. 2024, arXiv 2406.11617, §3.1). The expectation is the delta itself.

    ``by_norm``: scaled to the L1 norm that was there instead, as mergekit does.
    """
    if density >= 1:
        return delta_MN
    columns = delta_MN.shape[1]
    ranks = delta_MN.abs().argsort(dim=1, stable=True).argsort(dim=1).double()
    spread = ranks / (columns - 1) - 0.5 if columns > 1 else torch.zeros_like(ranks)
    keep = density + epsilon * spread
    mask = torch.rand(delta_MN.shape, generator=generator, dtype=torch.float64) < keep
    return _to_norm(delta_MN, mask) if by_norm else delta_MN * mask / keep


def without_outliers(delta_MN: Tensor, density: float, gamma: float) -> Tensor:
    """``density`` of the entries: the largest ones but for the ⌊gamma·M·N⌋ very largest (Model Breadcrumbs: Davari &
    Belilovsky 2023, arXiv 2312.06795)."""
    count = delta_MN.numel()
    kept = min(int(density * count), count)
    dropped = min(int(gamma * count), count - kept)
    order = delta_MN.abs().flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(count, dtype=torch.bool)
    mask[order[dropped : dropped + kept]] = True
    return delta_MN * mask.view_as(delta_MN)


def _to_norm(delta_MN: Tensor, mask: Tensor) -> Tensor:
    kept = delta_MN * mask
    before, after = delta_MN.abs().sum(), kept.abs().sum()
    return kept * (before / after) if min(before, after) >= 1e-7 else kept
