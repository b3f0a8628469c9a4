"""Where deltas are merged: in the small core that they span together, or as they are.

Shape legend: T adapters, M rows and N columns of a delta (O and I of a Linear), R the ranks' sum, P ≤ R and Q ≤ R the
widths of the core, K the rank of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]
"""(B, A) of shapes (M, r) and (r, N): a delta B·A with its scaling folded in, in fp32 or fp64."""


@dataclass(frozen=True, slots=True, eq=False)
class Core:
    """Deltas in bases that they share: Dᵢ = left · coresᵢ · rightᵀ, exactly, whatever their ranks.

    ``left_MP`` and ``right_NQ`` have orthonormal columns; ``cores_TPQ`` are in fp64.
    """

    left_MP: Tensor
    right_NQ: Tensor
    cores_TPQ: Tensor

    def factors(self, merged_PQ: Tensor, rank: int | None = None) -> tuple[Factors, float]:
        """B and A of left · merged · rightᵀ at ``rank`` at most, and the share of its energy (squared Frobenius norm)
        that is kept. √S is on both sides; without ``rank``, singular values that are rounding go and no others."""
        u, s, vt = torch.linalg.svd(merged_PQ.double(), full_matrices=False)
        width = _numerical_rank(s, merged_PQ.shape)
        width = max(1, width if rank is None else min(rank, width))
        energy = _kept(s, width)
        root = s[:width].sqrt()
        b_MK = self.left_MP @ (u[:, :width] * root).to(self.left_MP.dtype)
        a_KN = (self.right_NQ @ (vt[:width].T * root).to(self.right_NQ.dtype)).T
        return (b_MK.contiguous(), a_KN.contiguous()), energy


def core_of(members: Sequence[Factors]) -> Core:
    """The core of some deltas (Panariello et al., NeurIPS 2025, arXiv 2509.17786, §4).

    The bases are singular vectors of all left, and of all right, factors side by side. Each delta's factors are first
    balanced (B = U√S, A = √S·Vᵀ), so the core depends on the deltas and not on how they happened to be factored, and
    not on their order but for the signs of basis vectors, which no rule here minds.

    Cost: two QRs of tall matrices with R columns; all else is of size R. No M x N matrix is made.
    """
    b_MR = torch.cat([b for b, _ in members], dim=1)
    a_NR = torch.cat([a for _, a in members], dim=0).T
    q_b, r_b = torch.linalg.qr(b_MR.float())
    q_a, r_a = torch.linalg.qr(a_NR.float())
    small, start = [], 0
    for b, _ in members:
        part = slice(start, start + b.shape[1])
        small.append(r_b[:, part].double() @ r_a[:, part].double().T)
        start = part.stop
    lefts, rights = zip(*(_balanced(core) for core in small), strict=True)
    turn_left, turn_right = _basis(torch.cat(lefts, dim=1)), _basis(torch.cat(rights, dim=1))
    cores = torch.stack([turn_left.T @ core @ turn_right for core in small])
    return Core(q_b @ turn_left.float(), q_a @ turn_right.float(), cores)


def truncated(delta_MN: Tensor, rank: int) -> tuple[Factors, float]:
    """The nearest factors of ``rank`` at most to a dense delta, and the share of its energy that they keep.

    A dense singular value decomposition: for the space ``full``, where nothing smaller is exact.
    """
    u, s, vt = torch.linalg.svd(delta_MN.float(), full_matrices=False)
    width = max(1, min(rank, _numerical_rank(s, delta_MN.shape)))
    energy = _kept(s, width)
    root = s[:width].sqrt()
    return ((u[:, :width] * root).contiguous(), (vt[:width].T * root).T.contiguous()), energy


def _balanced(core: Tensor) -> tuple[Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(core, full_matrices=False)
    root = s.sqrt()
    return u * root, vt.T * root


def _basis(columns: Tensor) -> Tensor:
    """An orthonormal basis of the whole space, those directions first in which ``columns`` are longest."""
    basis: Tensor = torch.linalg.svd(columns, full_matrices=True).U
    return basis


def _kept(s: Tensor, width: int) -> float:
    """The share of Σs² that the first ``width`` have."""
    if not len(s) or not s[0] > 0:
        return 1.0
    squares = (s / s[0]) ** 2  # of values as small as they like
    return float(squares[:width].sum() / squares.sum())


def _numerical_rank(s: Tensor, shape: torch.Size) -> int:
    """Singular values above what fp32 factors can mean, as LAPACK and NumPy count rank."""
    if not len(s):
        return 0
    return int((s > s[0] * max(shape) * torch.finfo(torch.float32).eps).sum())
