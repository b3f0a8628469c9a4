"""What becomes of each parameter of a base that is merged into, and W + Δ of it, some rows at a time.

A writer of weights asks :class:`Changes` which parameters change, and for the :class:`Change` of each when its turn
comes: one adapter, several of them, or deltas that were merged before look the same to it.

Shape legend: M rows and N columns of a parameter, all but its first axis flattened; a vector is M rows of one column.
R rank, K token rows.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lora_runtime.errors import UnknownModules
from lora_runtime.weights import NOT_SAVED, AdapterWeights, LoraFactors, TokenRows

Place = tuple[str, str]
"""A leaf and the name of its parameter, both canonical."""
CANCELLED = torch.finfo(torch.float32).eps ** 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Change:
    """What one parameter W becomes: W + Σ wᵢ·(Fᵢ - W) + Σ wᵢ·(Tᵢ - W)[token rows] + scaling·B·A + Σ wᵢ·vᵢ.

    ``full``: whole values Fᵢ in W's shape, and their weights. ``rows``: token rows and their weights. ``factors``: a
    low-rank delta of a weight; its bias is not looked at. ``shifts``: vectors for a bias, and their weights. Any
    floating dtype.

    What replaces W alone replaces it exactly, rather than W + (F - W): a single one of ``full`` with weight 1, or a
    single one of ``rows`` with weight 1 without ``full``. What else there is adds to that.
    """

    full: tuple[tuple[Tensor, float], ...] = ()
    rows: tuple[tuple[TokenRows, float], ...] = ()
    factors: LoraFactors | None = None
    shifts: tuple[tuple[Tensor, float], ...] = ()

    def prepared(self) -> Change:
        """The same, quicker to ask for many blocks: factors as a Linear's, in fp32 and in memory of their own."""
        if self.factors is None:
            return self
        left_MR, right_RN = _left_right(self.factors)
        factors = LoraFactors(a=_owned(right_RN), b=_owned(left_MR), scaling=self.factors.scaling)
        return replace(self, factors=factors)

    def added(self, own_MN: Tensor, rows: slice) -> Tensor:
        """W + Δ of ``rows`` in fp32, which the caller may write into. ``own_MN``: W of those rows, in fp32; it is
        written into, and may be what is returned.

        The last bit may depend on which rows are asked for together, as the sums of a matrix product do.
        """
        result = self._replaced(own_MN, rows)
        for vector, weight in self.shifts:
            result.add_(_rows_of(vector, rows), alpha=weight)
        if self.factors is not None:
            left_MR, right_RN = _left_right(self.factors)
            result.addmm_(left_MR[rows].float(), right_RN.float(), alpha=self.factors.scaling)
        return result

    def norm(self) -> float | None:
        """‖Δ‖ where it follows from the factors, without a product of them: else None.

        ‖sBA‖² = s²·tr((BᵀB)(AAᵀ)), in fp64. Parts that cancel as far as fp32 can tell are nothing: 0.
        """
        if self.factors is None or self.full or self.rows or self.shifts:
            return None
        left_MR, right_RN = (factor.double() for factor in _left_right(self.factors))
        left_RR, right_RR = left_MR.T @ left_MR, right_RN @ right_RN.T
        squared = float((left_RR * right_RR).sum())
        of_parts = float(left_RR.trace() * right_RR.trace())
        return abs(self.factors.scaling) * math.sqrt(squared) if squared > CANCELLED * of_parts else 0.0

    def _replaced(self, own_MN: Tensor, rows: slice) -> Tensor:
        """W with what is carried in full, of ``rows``."""
        if not self.full:
            self._add_rows(own_MN, own_MN, rows)
            return own_MN
        values = [(_rows_of(tensor, rows), weight) for tensor, weight in self.full]
        if len(values) == 1 and values[0][1] == 1.0:
            result = values[0][0].to(torch.float32, copy=True)
        else:
            result = own_MN.clone()
            for value_MN, weight in values:
                result.add_(value_MN.float() - own_MN, alpha=weight)
        self._add_rows(result, own_MN, rows)
        return result

    def _add_rows(self, result: Tensor, own_MN: Tensor, rows: slice) -> None:
        """Token rows within ``rows``, into ``result``, which may be ``own_MN`` itself."""
        found = []
        for tokens, weight in self.rows:
            here = (tokens.indices >= rows.start) & (tokens.indices < rows.stop)
            if bool(here.any()):
                found.append((tokens.indices[here] - rows.start, tokens.rows[here].float(), weight))
        if len(self.rows) == 1 and self.rows[0][1] == 1.0 and not self.full:
            for at, values_KN, _ in found:
                result[at] = values_KN
            return
        changes = [(at, weight * (values_KN - own_MN[at])) for at, values_KN, weight in found]
        for at, change_KN in changes:
            result[at] += change_KN


class Changes(Protocol):
    """What a merge does to a base, parameter by parameter."""

    @property
    def places(self) -> frozenset[Place]:
        """Every parameter that changes."""
        ...

    def at(self, place: Place) -> Change:
        """The change of one of ``places``; asked for once, when its turn comes, and may be computed or read then."""
        ...


class AdapterChanges:
    """One adapter added in whole: its saved parameters and token rows take the base's place, its LoRA adds to them."""

    def __init__(self, weights: AdapterWeights) -> None:
        self._weights = weights
        places = {(leaf, name) for leaf, module in weights.saved.items() for name in module.parameters}
        places |= {(leaf, "weight") for leaf in (*weights.lora, *weights.token_rows)}
        places |= {(leaf, "bias") for leaf, factors in weights.lora.items() if factors.bias is not None}
        self._places = frozenset(places)

    @property
    def places(self) -> frozenset[Place]:
        return self._places

    def at(self, place: Place) -> Change:
        leaf, parameter = place
        full = self._weights.saved.get(leaf, NOT_SAVED).parameters.get(parameter)
        factors = self._weights.lora.get(leaf)
        if parameter == "bias":
            bias = None if factors is None else factors.bias
            return Change(
                full=() if full is None else ((full, 1.0),),
                shifts=() if factors is None or bias is None else ((bias, factors.scaling),),
            )
        if parameter != "weight":
            return Change(full=() if full is None else ((full, 1.0),))
        rows = self._weights.token_rows.get(leaf)
        if full is not None and rows is not None:
            # In an adapter by itself, rows replace what is there and do not differ from the base.
            kept = full.to(torch.promote_types(full.dtype, rows.rows.dtype))
            full, rows = kept.index_copy(0, rows.indices, rows.rows.to(kept.dtype)), None
        return Change(
            full=() if full is None else ((full, 1.0),),
            rows=() if rows is None else ((rows, 1.0),),
            factors=factors,
        )


def check_all_land(places_changed: Collection[Place], places_there: Collection[Place]) -> None:
    """Raise UnknownModules where a change has no tensor among ``places_there``: nothing is lost in silence."""
    if lost := sorted(set(places_changed) - set(places_there)):
        shown = ", ".join(".".join(place) for place in lost[:3])
        raise UnknownModules(
            f"The base's checkpoint holds no {shown}" + (f" (and {len(lost) - 3} more)" if len(lost) > 3 else "")
            + ", which the adapter changes. A tied head has no tensor of its own: untie the base first.",
            unmatched={".".join(place): [] for place in lost},
        )  # fmt: skip


def _left_right(factors: LoraFactors) -> tuple[Tensor, Tensor]:
    """Of shapes (M, R) and (R, N) in the weight's own orientation."""
    return (factors.a.T, factors.b.T) if factors.kind == "embedding" else (factors.b, factors.a)


def _owned(factor: Tensor) -> Tensor:
    """A contiguous copy in fp32 where torch puts it: a mapped file's tensor may lie anywhere, and products take other
    paths, to other last bits, for memory that is not aligned."""
    return factor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _rows_of(tensor: Tensor, rows: slice) -> Tensor:
    return tensor.reshape(-1, 1)[rows] if tensor.dim() < 2 else tensor[rows].flatten(1)
