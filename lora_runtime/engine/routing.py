"""Which slots each token of one step uses, and with what weight.

A step packs the tokens of many requests end to end. Tokens of one request stay together and
requests with equal targets are neighbours, so routing is a short list of *runs*. Layers ask
for what they need (a dense mask, the tokens of one slot) and each answer is computed once
per step, whatever the number of layers.

Shape legend: T tokens of the space, S slots asked for, R summed rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Signature = tuple[tuple[int, float], ...]
"""Sorted (slot, weight) pairs with non-zero weights; empty for base tokens."""

Space = Literal["text", "logits", "patch", "merged"]
"""What a layer's rows are: packed tokens, sampled positions, image patches, merged patches."""

NEGLIGIBLE = 1e-12
"""Below this, 1 - Σw counts as no share of the base: 0.7 + 0.2 + 0.1 is not 1.0 in binary."""


class Run(NamedTuple):
    """Tokens [start, stop) with one signature."""

    start: int
    stop: int
    signature: Signature


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Some tokens of the space and a weight for each.

    ``index`` is a slice where they are contiguous, else int64 (G,). ``weight`` is a float where all
    are alike, else (G, 1).
    """

    index: slice | Tensor
    weight: float | Tensor

    @property
    def is_empty(self) -> bool:
        return isinstance(self.index, slice) and self.index.start == self.index.stop


class BySlotRows(NamedTuple):
    """``tokens`` (S · C,) int64: the token of each row, 0 for padding; ``weight`` (S, C, 1), 0 for padding.

    ``slots`` says whose rows come when. ``is_identity``: row i is token i. ``is_plain``: every weight is 1.
    """

    slots: tuple[int, ...]
    tokens: Tensor
    weight: Tensor
    is_identity: bool
    is_plain: bool


class Routing:
    """The routing of one space in one step. Immutable once built; answers are memoised."""

    def __init__(
        self, signatures: Sequence[tuple[Signature, int]], *, device: torch.device, dtype: torch.dtype
    ) -> None:
        """``signatures``: (signature, number of tokens) in packing order."""
        self.device = device
        self.dtype = dtype
        self.signatures = tuple(signatures)
        self.runs = tuple(_merge(signatures))
        self.num_tokens = self.runs[-1].stop if self.runs else 0
        self.slots: frozenset[int] = frozenset(slot for run in self.runs for slot, _ in run.signature)
        self._active: dict[frozenset[int], tuple[int, ...]] = {}
        self._work: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, int]] = {}
        self._by_slot: dict[tuple[int, ...], BySlotRows] = {}
        self._masks: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}
        self._shares: dict[tuple[int, ...], Tensor] = {}
        self._groups: dict[int, Group] = {}
        self._base_groups: dict[tuple[int, ...], Group] = {}

    def active(self, owners: frozenset[int]) -> tuple[int, ...]:
        """Slots that are both used in this step and in ``owners``, ascending."""
        found = self._active.get(owners)
        if found is None:
            found = self._active[owners] = tuple(sorted(self.slots & owners))
        return found

    def mask(self, slots: tuple[int, ...], ranks: tuple[int, ...]) -> Tensor:
        """M (T, R): token t's weight on slot j, repeated ``ranks[j]`` times."""
        key = (slots, ranks)
        found = self._masks.get(key)
        if found is None:
            per_run = torch.tensor([self._weights_row(run.signature, slots) for run in self.runs], dtype=self.dtype)
            found = self._masks[key] = self._per_token(per_run.repeat_interleave(torch.tensor(ranks), dim=1))
        return found

    def low_rank_work(self, slots: tuple[int, ...], ranks: tuple[int, ...]) -> tuple[int, int]:
        """Σ tokens × rank over each run's own slots, and how many (run, slot) pairs there are."""
        key = (slots, ranks)
        found = self._work.get(key)
        if found is None:
            rank_of = dict(zip(slots, ranks, strict=True))
            parts = [(run, slot) for run in self.runs for slot, _ in run.signature if slot in rank_of]
            found = sum((run.stop - run.start) * rank_of[slot] for run, slot in parts), len(parts)
            self._work[key] = found
        return found

    def by_slot(self, slots: tuple[int, ...]) -> BySlotRows:
        """Each slot's tokens, padded to the busiest. Slots come in order of their first token, so that rows of one
        slot each stand as the tokens do."""
        found = self._by_slot.get(slots)
        if found is None:
            tokens: dict[int, list[tuple[int, float]]] = {}
            for run in self.runs:
                for slot, weight in run.signature:
                    if slot in slots:
                        tokens.setdefault(slot, []).extend((token, weight) for token in range(run.start, run.stop))
            count = max((len(rows) for rows in tokens.values()), default=0)
            padded = [rows + [(0, 0.0)] * (count - len(rows)) for rows in tokens.values()]
            index = [token for rows in padded for token, _ in rows]
            found = self._by_slot[slots] = BySlotRows(
                slots=tuple(tokens),
                tokens=torch.tensor(index, dtype=torch.int64, device=self.device),
                weight=torch.tensor(
                    [[[weight] for _, weight in rows] for rows in padded], dtype=self.dtype, device=self.device
                ),
                is_identity=index == list(range(self.num_tokens)),
                is_plain=all(weight == 1.0 for rows in padded for _, weight in rows),
            )
        return found

    def weights(self, slots: tuple[int, ...]) -> Tensor:
        """(T, S): token t's weight on each slot."""
        return self.mask(slots, (1,) * len(slots))

    def shares(self, saving: tuple[int, ...]) -> Tensor:
        """(T, 1 + S): the share 1 - Σw of a leaf's own weights, then the weight of each of ``saving``."""
        found = self._shares.get(saving)
        if found is None:
            rows = []
            for run in self.runs:
                row = self._weights_row(run.signature, saving)
                own = 1.0 - sum(row)
                rows.append([own if abs(own) > NEGLIGIBLE else 0.0, *row])
            found = self._shares[saving] = self._per_token(torch.tensor(rows, dtype=self.dtype))
        return found

    def group(self, slot: int) -> Group:
        """The tokens whose signature has ``slot``, and their weights."""
        found = self._groups.get(slot)
        if found is None:
            shares = [(run, dict(run.signature).get(slot, 0.0)) for run in self.runs]
            found = self._groups[slot] = self._gather(shares)
        return found

    def base_group(self, saving: tuple[int, ...]) -> Group:
        """The tokens that need a leaf's own weights when ``saving`` replace it: share 1 - Σ w."""
        found = self._base_groups.get(saving)
        if found is None:
            members = frozenset(saving)
            shares = [(run, 1.0 - sum(w for s, w in run.signature if s in members)) for run in self.runs]
            found = self._base_groups[saving] = self._gather(shares)
        return found

    def _per_token(self, per_run: Tensor) -> Tensor:
        """Rows of runs, repeated for each of their tokens."""
        lengths = torch.tensor([run.stop - run.start for run in self.runs])
        return per_run.repeat_interleave(lengths, dim=0).to(self.device)

    @staticmethod
    def _weights_row(signature: Signature, slots: tuple[int, ...]) -> list[float]:
        weights = dict(signature)
        return [weights.get(slot, 0.0) for slot in slots]

    def _gather(self, shares: Sequence[tuple[Run, float]]) -> Group:
        used = [(run, share) for run, share in shares if abs(share) > NEGLIGIBLE]
        if not used:
            return Group(slice(0, 0), 0.0)
        contiguous = all(left.stop == right.start for (left, _), (right, _) in pairwise(used))
        index: slice | Tensor = slice(used[0][0].start, used[-1][0].stop)
        if not contiguous:
            index = torch.cat([torch.arange(run.start, run.stop) for run, _ in used]).to(self.device)
        if len({share for _, share in used}) == 1:
            return Group(index, used[0][1])
        lengths = torch.tensor([run.stop - run.start for run, _ in used])
        weight = torch.tensor([share for _, share in used], dtype=self.dtype).repeat_interleave(lengths)
        return Group(index, weight.to(self.device).unsqueeze(1))


class Router:
    """Where layers find the routing of the step that runs. One per engine; set between steps only.

    A space without routing is all base.
    """

    def __init__(self) -> None:
        self._current: dict[Space, Routing] = {}

    def set(self, **spaces: Routing) -> None:
        """Route these spaces, e.g. ``set(text=..., logits=...)``; the others keep what they had."""
        self._current.update(spaces)  # type: ignore[arg-type]  # keywords are str, spaces are a Literal

    def clear(self) -> None:
        """Everything is base again."""
        self._current.clear()

    def get(self, space: Space) -> Routing | None:
        return self._current.get(space)

    def like_last(
        self,
        space: Space,
        signatures: Sequence[tuple[Signature, int]],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Routing:
        """A routing of ``space``: the current one where nothing changed, as in most steps while requests decode."""
        last = self._current.get(space)
        if last is not None and last.signatures == tuple(signatures):
            return last
        return Routing(signatures, device=device, dtype=dtype)


def _merge(signatures: Sequence[tuple[Signature, int]]) -> list[Run]:
    runs: list[Run] = []
    position = 0
    for signature, count in signatures:
        if count == 0:
            continue
        if runs and runs[-1].signature == signature:
            runs[-1] = runs[-1]._replace(stop=position + count)
        else:
            runs.append(Run(position, position + count, signature))
        position += count
    return runs
