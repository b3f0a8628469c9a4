"""y[t] += Σ_s w[t,s] · (x[t] · A_sᵀ) · B_s, in several forms that give the same and differ in cost.

Shape legend: T tokens, I in features, O out features, R rank, S slots in play, C tokens of the busiest slot,
P outputs that a fused leaf is made of (q, k and v in one; mostly 1), N pieces of W outputs each that they are cut into.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_runtime.engine.routing import BySlotRows, Routing

Name = Literal["dense", "by_run", "by_slot"]
MAX_PIECES = 64
"""Beyond it, widths have no divisor to speak of in common."""


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
        """In place on ``y`` (T, O), contiguous, from ``x`` (T, I)."""


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


class Pieces(NamedTuple):
    """A fused leaf's outputs, cut into pieces of equal width so that one batched product makes them all.

    ``part``: of each piece (N,), which of the P it belongs to, int64; parts without factors have none. ``place``:
    where each stands among all pieces of the leaf (N,), int64. ``width`` W. ``is_whole``: no part is left out.
    ``is_plain``: each part is one piece.
    """

    part: Tensor
    place: Tensor
    width: int
    is_whole: bool
    is_plain: bool


@dataclass(frozen=True, slots=True, eq=False)
class BySlot:
    """Two batched products over slots, each with its own tokens, padded to the busiest.

    Each factor is read once and no token pays for another's rank: best where many slots have few tokens each,
    as in decoding. ``a`` (S, I, PR) of the parts that have factors, ``b`` (SN, R, W).
    """

    a: Tensor
    b: Tensor
    pieces: Pieces
    rows: BySlotRows

    def add(self, y: Tensor, x: Tensor) -> None:
        num_slots, count, _ = self.rows.weight.shape
        chosen = x if self.rows.is_identity else x[self.rows.tokens]
        hidden = torch.bmm(chosen.reshape(num_slots, count, -1), self.a)
        if not self.rows.is_plain:
            hidden *= self.rows.weight
        rank, width = self.b.shape[1:]
        spread = hidden.view(num_slots, count, -1, rank).transpose(1, 2)
        if not self.pieces.is_plain:
            spread = spread.index_select(1, self.pieces.part)
        made = torch.bmm(spread.reshape(-1, count, rank), self.b)
        # (SN, C, W) to rows of tokens, (SC, N, W).
        made = made.view(num_slots, -1, count, width).transpose(1, 2).flatten(0, 1)
        if not self.pieces.is_whole:
            whole = made.new_zeros(num_slots * count, y.shape[1] // width, width)
            made = whole.index_copy_(1, self.pieces.place, made)
        if self.rows.is_identity:
            y += made.flatten(1)
        else:
            y.index_add_(0, self.rows.tokens, made.flatten(1))


@dataclass(frozen=True, slots=True, eq=False)
class OneEach:
    """:class:`BySlot` where each row is one slot's only token and every output has factors: nothing is moved.

    What decoding mostly is, and its matrices are small: each operator that is saved here is felt. ``part`` (N,) int64
    of the pieces, None where each part is one; ``weight`` (S, 1, 1), None where all are 1.
    """

    a: Tensor
    b: Tensor
    part: Tensor | None
    weight: Tensor | None

    def add(self, y: Tensor, x: Tensor) -> None:
        hidden = torch.bmm(x.unsqueeze(1), self.a)
        if self.weight is not None:
            hidden *= self.weight
        num_pieces, rank, width = self.b.shape
        if self.part is not None:
            hidden = hidden.view(x.shape[0], -1, rank).index_select(1, self.part)
        y.view(num_pieces, 1, width).baddbmm_(hidden.view(num_pieces, 1, rank), self.b)


def cheapest(
    routing: Routing, slots: tuple[int, ...], factors: Mapping[int, Factors], widths: tuple[int, ...], launch: float
) -> Name:
    """The form with the fewest multiply-adds; ``launch`` is what one kernel launch is worth in them."""
    ranks = tuple(sum(factors[slot].ranks) for slot in slots)
    width = factors[slots[0]].a.shape[1] + sum(widths)
    token_ranks, num_parts = routing.low_rank_work(slots, ranks)
    cost: dict[Name, float] = {
        "dense": routing.num_tokens * sum(ranks) * width + 3 * launch,
        "by_run": token_ranks * width + 2 * num_parts * launch,
    }
    if sum(widths) <= MAX_PIECES * math.gcd(*widths):
        highest = _highest(factors, slots)
        used = [out for rank, out in zip(highest, widths, strict=True) if rank]
        per_row = max(highest) * (len(used) * factors[slots[0]].a.shape[1] + sum(used))
        cost["by_slot"] = routing.by_slot(slots).tokens.numel() * per_row + 5 * launch
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
    stacked, b = kept[key]
    a = stacked.transpose(1, 2)
    pieces = _pieces(_highest(factors, slots), widths, a.device)
    if rows.is_identity and rows.weight.shape[1] == 1 and pieces.is_whole:
        return OneEach(
            a, b, part=None if pieces.is_plain else pieces.part, weight=None if rows.is_plain else rows.weight
        )
    return BySlot(a, b, pieces, rows)


def _side_by_side(factors: Mapping[int, Factors], slots: tuple[int, ...]) -> tuple[Tensor, ...]:
    members = [factors[slot] for slot in slots]
    if len(members) == 1:
        return members[0].a, members[0].b
    return torch.cat([member.a for member in members]), torch.cat([member.b for member in members])


def _highest(factors: Mapping[int, Factors], slots: Sequence[int]) -> tuple[int, ...]:
    """Of each of the leaf's outputs the highest rank."""
    return tuple(map(max, zip(*(factors[slot].ranks for slot in slots), strict=True)))


def _pieces(highest: Sequence[int], widths: Sequence[int], device: torch.device) -> Pieces:
    width = math.gcd(*widths)
    owner = [part for part, out in enumerate(widths) for _ in range(out // width)]
    used = [part for part, rank in enumerate(highest) if rank]
    place = [place for place, part in enumerate(owner) if part in used]
    part = [used.index(owner[here]) for here in place]
    return Pieces(
        part=torch.tensor(part, device=device),
        place=torch.tensor(place, device=device),
        width=width,
        is_whole=len(place) == len(owner),
        is_plain=len(part) == len(used),
    )


def _stacked(factors: Mapping[int, Factors], slots: tuple[int, ...], widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """A (S, PR, I) and B as :class:`BySlot` has it; lower ranks are padded with zeros."""
    members = [factors[slot] for slot in slots]
    highest = _highest(factors, slots)
    piece = math.gcd(*widths)
    if len({member.ranks for member in members}) == 1 and len(set(highest) - {0}) == 1:
        # Nothing to pad: few copies, since this is made anew whenever other slots are in play.
        a = torch.stack([member.a for member in members])
        parts, row, left = [], 0, 0
        for own, width in zip(highest, widths, strict=True):
            if own:
                made = torch.stack([member.b[row : row + own, left : left + width] for member in members])
                parts.append(made.view(len(slots), own, -1, piece).transpose(1, 2))
            row, left = row + own, left + width
        return a, torch.cat(parts, dim=1).flatten(0, 1)
    rank = max(highest)
    like = members[0].a
    used = [part for part, own in enumerate(highest) if own]
    a = like.new_zeros(len(slots), len(used), rank, like.shape[1])
    b = like.new_zeros(len(slots), sum(widths[part] for part in used) // piece, rank, piece)
    for place, member in enumerate(members):
        source = column = target = 0
        for part, width in enumerate(widths):
            own = member.ranks[part]
            if part in used:
                a[place, used.index(part), :own] = member.a[source : source + own]
                cut = member.b[source : source + own, column : column + width].reshape(own, width // piece, piece)
                b[place, target : target + cut.shape[1], :own] = cut.transpose(0, 1)
                target += cut.shape[1]
            source, column = source + own, column + width
    return a.flatten(1, 2), b.flatten(0, 1)
