"""y[t] += Σ_s w[t,s] · (x[t] · A_sᵀ) · B_s, in three forms that give the same and differ in cost.

Shape legend: T tokens, I in features, O out features, R rank, S slots in play, C tokens of the busiest slot,
P outputs that a fused leaf is made of (q, k and v in one; mostly 1), W the width of one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_runtime.engine.routing import BySlotRows, Routing

Name = Literal["dense", "by_run", "by_slot"]


class Factors(NamedTuple):
    """One slot's low-rank factors, scaling folded into ``b``: ``a`` (R, I), ``b`` (R, O).

    ``ranks`` has one entry for each of the leaf's P outputs, in order; rows of ``b`` that belong to one
    are zero in the columns of the others.
    """

    a: Tensor
    b: Tensor
    ranks: tuple[int, ...]


class Form(Protocol):
    def add(self, y: Tensor, x: Tensor) -> None:
        """In place on ``y`` (T, O), from ``x`` (T, I)."""


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """((x · Aᵀ) ∘ M) · B over all slots side by side, M[t, block(s)] = w[t,s].

    Three kernels whatever the mix; each token pays for the ranks of all slots. ``a`` (ΣR, I), ``b`` (ΣR, O),
    ``mask`` M (T, ΣR).
    """

    a: Tensor
    b: Tensor
    mask: Tensor

    def add(self, y: Tensor, x: Tensor) -> None:
        hidden = linear(x, self.a)
        hidden *= self.mask
        y.addmm_(hidden, self.b)


@dataclass(frozen=True, slots=True, eq=False)
class ByRun:
    """One product for each run of tokens with one signature and each of its slots. Best where runs are long."""

    factors: Mapping[int, Factors]
    routing: Routing

    def add(self, y: Tensor, x: Tensor) -> None:
        for start, stop, signature in self.routing.runs:
            for slot, weight in signature:
                if slot in self.factors:
                    member = self.factors[slot]
                    y[start:stop].addmm_(linear(x[start:stop], member.a), member.b, alpha=weight)


class Block(NamedTuple):
    """One of a fused leaf's outputs: its ranks, its columns of y, and ``b`` (S, R, W)."""

    ranks: slice
    columns: slice
    b: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class BySlot:
    """One batched product over slots, each with its own tokens, padded to the busiest.

    Each factor is read once and no token pays for another's rank: best where many slots have few tokens each,
    as in decoding. ``a`` (S, R, I).
    """

    a: Tensor
    blocks: tuple[Block, ...]
    rows: BySlotRows

    def add(self, y: Tensor, x: Tensor) -> None:
        num_slots, count, _ = self.rows.weight.shape
        chosen = x if self.rows.is_identity else x[self.rows.tokens]
        hidden = torch.bmm(chosen.reshape(num_slots, count, -1), self.a.transpose(1, 2))
        if not self.rows.is_plain:
            hidden *= self.rows.weight
        is_whole = len(self.blocks) == 1 and self.blocks[0].b.shape[2] == y.shape[1]
        if self.rows.is_identity and is_whole and y.is_contiguous():
            y.view(num_slots, count, -1).baddbmm_(hidden, self.blocks[0].b)
            return
        for block in self.blocks:
            part = torch.bmm(hidden[:, :, block.ranks], block.b).view(num_slots * count, -1)
            if self.rows.is_identity:
                y[:, block.columns] += part
            else:
                y[:, block.columns].index_add_(0, self.rows.tokens, part)


def cheapest(
    routing: Routing, slots: tuple[int, ...], factors: Mapping[int, Factors], widths: tuple[int, ...], launch: float
) -> Name:
    """The form with the fewest multiply-adds; ``launch`` is what one kernel launch is worth in them."""
    ranks = tuple(sum(factors[slot].ranks) for slot in slots)
    width = factors[slots[0]].a.shape[1] + sum(widths)
    token_ranks, num_parts = routing.low_rank_work(slots, ranks)
    highest = [max(factors[slot].ranks[part] for slot in slots) for part in range(len(widths))]
    in_features = factors[slots[0]].a.shape[1]
    per_row = sum(rank * (in_features + out) for rank, out in zip(highest, widths, strict=True))
    cost: dict[Name, float] = {
        "dense": routing.num_tokens * sum(ranks) * width + 3 * launch,
        "by_run": token_ranks * width + 2 * num_parts * launch,
        "by_slot": routing.by_slot(slots).tokens.numel() * per_row + (3 + 2 * len(widths)) * launch,
    }
    return min(cost, key=cost.__getitem__)


def make(
    name: Name,
    routing: Routing,
    slots: tuple[int, ...],
    factors: Mapping[int, Factors],
    widths: tuple[int, ...],
    kept: dict[tuple[Name, tuple[int, ...]], tuple[Tensor, ...]],
) -> Form:
    """The form ``name`` for one routing. ``kept`` holds factors laid out for earlier routings of equal slots."""
    if name == "by_run":
        return ByRun(factors, routing)
    rows = routing.by_slot(slots)
    slots = rows.slots if name == "by_slot" else slots
    key = name, slots
    if key not in kept:
        kept.clear()
        kept[key] = _side_by_side(factors, slots) if name == "dense" else _stacked(factors, slots, widths)
    if name == "dense":
        a, b = kept[key]
        return Dense(a, b, routing.mask(slots, tuple(factors[slot].a.shape[0] for slot in slots)))
    a, *parts = kept[key]
    blocks, rank, column = [], 0, 0
    for b, width in zip(parts, widths, strict=True):
        blocks.append(Block(slice(rank, rank + b.shape[1]), slice(column, column + width), b))
        rank, column = rank + b.shape[1], column + width
    return BySlot(a, tuple(block for block in blocks if block.b.shape[1]), rows)


def _side_by_side(factors: Mapping[int, Factors], slots: tuple[int, ...]) -> tuple[Tensor, ...]:
    members = [factors[slot] for slot in slots]
    if len(members) == 1:
        return members[0].a, members[0].b
    return torch.cat([member.a for member in members]), torch.cat([member.b for member in members])


def _stacked(factors: Mapping[int, Factors], slots: tuple[int, ...], widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """A (S, ΣR, I), then B (S, R, W) of each output; lower ranks are padded with zeros."""
    members = [factors[slot] for slot in slots]
    highest = [max(member.ranks[part] for member in members) for part in range(len(widths))]
    like = members[0].a
    a = like.new_zeros(len(slots), sum(highest), like.shape[1])
    parts = [like.new_zeros(len(slots), rank, width) for rank, width in zip(highest, widths, strict=True)]
    for place, member in enumerate(members):
        source = target = column = 0
        for part, width in enumerate(widths):
            rank = member.ranks[part]
            a[place, target : target + rank] = member.a[source : source + rank]
            parts[part][place, :rank] = member.b[source : source + rank, column : column + width]
            source, target, column = source + rank, target + highest[part], column + width
    return a, *parts
