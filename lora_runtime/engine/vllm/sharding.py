"""Which rows and columns of a leaf a tensor-parallel worker holds, and an adapter's tensors cut to them.

A leaf that vLLM splits by outputs keeps rows of its weight (q, k and v each their own heads), one split by inputs
keeps columns and is summed over the workers afterwards, so that only the first adds biases (Shoeybi et al. 2019,
arXiv 1909.08053, section 3). A vocabulary is split by rows.

Shape legend: R rank, I in features, O out features, V vocabulary, D embedding width, N token rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_runtime.weights import LoraFactors, SavedModule, TokenRows

Span = tuple[int, int]
"""[start, stop)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What a worker holds of one leaf. ``rows``: spans of the weight's first dimension, in the order it keeps them;
    ``columns``: a span of the second; None for all. ``has_bias``: whether this worker adds the leaf's biases.
    """

    rows: tuple[Span, ...] | None = None
    columns: Span | None = None
    has_bias: bool = True

    def width(self, whole: int) -> int:
        """Rows held of ``whole``."""
        return whole if self.rows is None else sum(stop - start for start, stop in self.rows)

    def outputs(self, y: Tensor) -> Tensor:
        """The held part of a linear's outputs (O,)."""
        return _cut(y, self.rows)

    def lora(self, factors: LoraFactors) -> LoraFactors:
        """Factors whose ΔW is the held part of the whole ΔW."""
        if factors.kind == "embedding":
            return replace(factors, a=_cut(factors.a, self.rows, dim=1))
        bias = None if factors.bias is None or not self.has_bias else _cut(factors.bias, self.rows)
        a = factors.a if self.columns is None else factors.a[:, slice(*self.columns)]
        return replace(factors, a=a, b=_cut(factors.b, self.rows), bias=bias)

    def parameter(self, name: str, tensor: Tensor) -> Tensor | None:
        """The held part of a saved ``weight`` or ``bias``; None where this worker adds no bias."""
        if name == "bias":
            return _cut(tensor, self.rows) if self.has_bias else None
        held = _cut(tensor, self.rows)
        return held if self.columns is None else held[:, slice(*self.columns)]

    def saved(self, module: SavedModule) -> SavedModule | None:
        """The held part of a saved module; None where nothing of it is held."""
        held = {name: self.parameter(name, tensor) for name, tensor in module.parameters.items()}
        kept = {name: tensor for name, tensor in held.items() if tensor is not None}
        return SavedModule(parameters=kept) if kept else None

    def token_rows(self, rows: TokenRows) -> TokenRows | None:
        """The trained rows that are held, counted from the first held; None where there are none."""
        if self.rows is None:
            return rows
        ((start, stop),) = self.rows
        here = (rows.indices >= start) & (rows.indices < stop)
        return TokenRows(indices=rows.indices[here] - start, rows=rows.rows[here]) if bool(here.any()) else None


WHOLE = Shard()


def heads(total: int, size: int, rank: int, num_workers: int) -> Span:
    """The span of ``total`` heads of ``size`` outputs that worker ``rank`` keeps; workers share heads beyond them."""
    if num_workers >= total:
        index = rank // (num_workers // total)
        return index * size, (index + 1) * size
    count = total // num_workers
    return rank * count * size, (rank + 1) * count * size


def evenly(total: int, rank: int, num_workers: int) -> Span:
    """The span of ``total`` that worker ``rank`` keeps of equal parts."""
    count = total // num_workers
    return rank * count, (rank + 1) * count


def _cut(tensor: Tensor, spans: Sequence[Span] | None, dim: int = 0) -> Tensor:
    if spans is None:
        return tensor
    parts = [tensor.narrow(dim, start, stop - start) for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)
