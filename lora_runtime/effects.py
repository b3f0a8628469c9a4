"""How large an adapter's change of each leaf is, and how much of it an engine's dtype rounds away.

Low-rank factors, token rows and a bias alone are kept as differences from the base, of which a dtype takes its own
rounding and no more. A weight that is carried in full is kept as a whole: what a dtype takes of that is relative to the
weight, and may be much of a small change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_runtime.weights import AdapterWeights, BaseParameter, LoraFactors, SavedModule, is_shift

CANCELLED = torch.finfo(torch.float32).eps ** 2
"""‖Δ‖²/Σ‖parts‖² below which the parts of a delta cancel as far as fp32 can tell."""
SMALLEST = 1e-12
"""‖W₀‖ that changes are compared with at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What an adapter does to one leaf. Norms are Frobenius'.

    ``size``: ‖Δ‖/‖W₀‖, of all the adapter's parts of the leaf together at most. ``carried``: ‖W - W₀‖ of what is
    carried in full. ``lost``: ‖(r(W) - r(W₀)) - (W - W₀)‖ of that, where r rounds to the engine's dtype; of a bias
    alone ‖r(W - W₀) - (W - W₀)‖. ``carried_bytes``: of W as an engine keeps it. ``other_bytes``: of all else.
    """

    leaf: str
    size: float
    carried: float
    lost: float
    carried_bytes: int
    other_bytes: int

    @property
    def share_lost(self) -> float:
        """Of what is carried in full, 0 to about 1; 0 where nothing is."""
        return self.lost / self.carried if self.carried else 0.0


def effect_of(leaf: str, weights: AdapterWeights, base: BaseParameter, dtype: torch.dtype) -> Effect:
    """What ``weights`` do to ``leaf`` in an engine that computes in ``dtype``. Holds a few of the leaf in fp32.

    ``weights`` must have what is carried in full unrounded.
    """
    own = base(leaf, "weight").float()
    size = carried = lost = 0.0
    carried_bytes = other_bytes = 0
    if (factors := weights.lora.get(leaf)) is not None:
        size += norm_of(factors)
        other_bytes += _num_bytes([factors.a, factors.b, factors.bias])
    if (saved := weights.saved.get(leaf)) is not None:
        for name, tensor in saved.parameters.items():
            before = own if name == "weight" else base(leaf, name).float()
            change = tensor.float() - before
            carried = math.hypot(carried, float(change.norm()))
            lost = math.hypot(lost, _lost(saved, tensor, before, change, dtype))
            carried_bytes += tensor.numel() * dtype.itemsize
        size += carried
    if (rows := weights.token_rows.get(leaf)) is not None:
        size += float((rows.rows.float() - own[rows.indices]).norm())
        other_bytes += _num_bytes([rows.indices, rows.rows])
    return Effect(
        leaf=leaf,
        size=size / max(float(own.norm()), SMALLEST),
        carried=carried,
        lost=lost,
        carried_bytes=carried_bytes,
        other_bytes=other_bytes,
    )


def share_lost(effects: Iterable[Effect]) -> float:
    """Of all that is carried in full, together: ‖lost‖/‖carried‖."""
    carried = lost = 0.0
    for effect in effects:
        carried, lost = math.hypot(carried, effect.carried), math.hypot(lost, effect.lost)
    return lost / carried if carried else 0.0


def norm_of(factors: LoraFactors) -> float:
    """‖scaling·B·A‖ and the bias's norm, without the product: ‖BA‖² = tr((BᵀB)(AAᵀ)), in fp64.

    Parts that cancel as far as fp32 can tell are nothing: 0.
    """
    a, b = factors.a.double(), factors.b.double()
    left, right = b.T @ b, a @ a.T
    squared = float((left * right).sum())
    product = math.sqrt(squared) if squared > CANCELLED * float(left.trace() * right.trace()) else 0.0
    bias = 0.0 if factors.bias is None else float(factors.bias.double().norm())
    return (product + bias) * abs(factors.scaling)


def _lost(saved: SavedModule, tensor: Tensor, before: Tensor, change: Tensor, dtype: torch.dtype) -> float:
    kept = change.to(dtype).float() if is_shift(saved) else tensor.to(dtype).float() - before.to(dtype).float()
    return float((kept - change).norm())


def _num_bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
