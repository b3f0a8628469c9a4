"""W + Δ by blocks of rows is dense arithmetic's, whatever a change is made of; and what combine() would make of it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from lora_runtime.combine import combine, sum_factors
from lora_runtime.merge.changes import AdapterChanges, Change
from lora_runtime.weights import NOT_SAVED, AdapterWeights, LoraFactors, SavedModule, TokenRows

TOLERANCE = 2e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WEIGHTS = st.one_of(st.just(1.0), st.just(0.0), st.floats(-3, 3, allow_subnormal=False))
SIDES = st.integers(1, 40)


@dataclass(frozen=True)
class Draw:
    """Random tensors, the same for one seed."""

    generator: Generator

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(dtype)

    def rows(self, rows: int, columns: int, dtype: torch.dtype) -> TokenRows:
        count = 1 + int(torch.randint(rows, (1,), generator=self.generator))
        indices = torch.randperm(rows, generator=self.generator)[:count]
        return TokenRows(indices=indices, rows=self.tensor(count, columns, dtype=dtype))

    def factors(self, rows: int, columns: int, rank: int, kind: str, dtype: torch.dtype) -> LoraFactors:
        if kind == "embedding":
            a, b = self.tensor(rank, rows, dtype=dtype), self.tensor(columns, rank, dtype=dtype)
            return LoraFactors(a=a, b=b, scaling=0.7, kind="embedding")
        a, b = self.tensor(rank, columns, dtype=dtype), self.tensor(rows, rank, dtype=dtype)
        return LoraFactors(a=a, b=b, scaling=0.7)


draws = st.integers(0, 10**6).map(lambda seed: Draw(Generator().manual_seed(seed)))


def in_blocks(change: Change, own: Tensor, step: int) -> Tensor:
    matrix = own.reshape(-1, 1) if own.dim() < 2 else own.flatten(1)
    found = [
        change.added(matrix[first : first + step].float().clone(), slice(first, min(len(matrix), first + step)))
        for first in range(0, len(matrix), step)
    ]
    return torch.cat(found).reshape(own.shape)


def dense(change: Change, own: Tensor) -> Tensor:
    own = own.double()
    total = own.clone()
    for full, weight in change.full:
        total += weight * (full.double() - own)
    for tokens, weight in change.rows:
        total[tokens.indices] += weight * (tokens.rows.double() - own[tokens.indices])
    for vector, weight in change.shifts:
        total += weight * vector.double()
    if change.factors is not None:
        product = change.factors.scaling * (change.factors.b.double() @ change.factors.a.double())
        total += (product.T if change.factors.kind == "embedding" else product).reshape(own.shape)
    return total


def close(got: Tensor, want: Tensor) -> bool:
    assert got.dtype is torch.float32 and got.shape == want.shape
    return bool(((got.double() - want.double()).abs() <= TOLERANCE * max(1.0, float(want.abs().max()))).all())


@given(
    draws, SIDES, SIDES, st.integers(0, 8), st.lists(WEIGHTS, max_size=3), st.lists(WEIGHTS, max_size=3),
    st.sampled_from(["linear", "embedding"]), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.integers(1, 41),
)  # fmt: skip
def test_a_weight(
    draw: Draw, rows: int, columns: int, rank: int, fulls: list[float], tokens: list[float], kind: str,
    of_base: torch.dtype, of_parts: torch.dtype, step: int,
):  # fmt: skip
    change = Change(
        full=tuple((draw.tensor(rows, columns, dtype=of_parts), weight) for weight in fulls),
        rows=tuple((draw.rows(rows, columns, of_parts), weight) for weight in tokens),
        factors=draw.factors(rows, columns, rank, kind, of_parts) if rank else None,
    )
    own = draw.tensor(rows, columns, dtype=of_base)
    before = own.clone()
    want = dense(change, own)
    assert close(in_blocks(change, own, step), want) and close(in_blocks(change.prepared(), own, step), want)
    assert torch.equal(own, before)
    if rank and not fulls and not tokens:
        assert change.norm() == pytest.approx(float((want - own.double()).norm()), rel=1e-6)
    else:
        assert change.norm() is None


@given(
    draws, SIDES, st.lists(WEIGHTS, max_size=3), st.lists(WEIGHTS, max_size=3), st.sampled_from(DTYPES),
    st.integers(1, 41),
)  # fmt: skip
def test_a_bias(draw: Draw, length: int, fulls: list[float], shifts: list[float], of_parts: torch.dtype, step: int):
    change = Change(
        full=tuple((draw.tensor(length, dtype=of_parts), weight) for weight in fulls),
        shifts=tuple((draw.tensor(length, dtype=of_parts), weight) for weight in shifts),
    )
    own = draw.tensor(length)
    assert close(in_blocks(change, own, step), dense(change, own))


@given(draws, st.sampled_from(DTYPES), st.integers(1, 9))
def test_a_convolution_is_a_matrix(draw: Draw, dtype: torch.dtype, step: int):
    """Also where its values lie in another order in memory."""
    shape = (6, 3, 2, 2, 2)
    full = draw.tensor(6, 2, 2, 2, 3, dtype=dtype).permute(0, 4, 1, 2, 3)
    change = Change(full=((full, 0.4),), factors=draw.factors(6, 24, 3, "linear", dtype))
    own = draw.tensor(*shape)
    assert close(in_blocks(change.prepared(), own, step), dense(change, own))


def test_what_replaces_alone_is_exact():
    """Though W + (F - W) would not be it: here F is lost beside W."""
    own, full = torch.full((4, 3), 1e8), torch.full((4, 3), 1e-8)
    tokens = TokenRows(indices=torch.tensor([2, 0]), rows=torch.full((2, 3), 1e-8))
    assert torch.equal(in_blocks(Change(full=((full, 1.0),)), own, 3), full)
    got = in_blocks(Change(rows=((tokens, 1.0),)), own, 3)
    assert torch.equal(got[[0, 2]], tokens.rows) and torch.equal(got[[1, 3]], own[[1, 3]])
    ones = LoraFactors(a=torch.ones(1, 3), b=torch.ones(4, 1), scaling=0.5)
    assert torch.equal(in_blocks(Change(rows=((tokens, 1.0),), factors=ones), own, 3)[[0, 2]], tokens.rows + 0.5)


def test_parts_that_cancel_are_nothing():
    """Rather than what fp64 leaves of them, which would be taken for a change that was lost."""
    draw = Draw(Generator().manual_seed(0))
    one = draw.factors(30, 20, 4, "linear", torch.float32)
    both = sum_factors("leaf", [(one, 0.3), (one, -0.3)])
    assert Change(factors=both).norm() == 0.0
    assert Change(factors=sum_factors("leaf", [(one, 0.3), (one, -0.3001)])).norm() > 0.0


def an_adapter(draw: Draw, parts: tuple[bool, bool, bool, bool], kind: str, version: str) -> AdapterWeights:
    saved, rows, lora, bias = parts
    factors = draw.factors(12, 7, 3, kind, torch.float32)
    if bias and kind == "linear":
        factors = LoraFactors(a=factors.a, b=factors.b, scaling=0.7, bias=draw.tensor(12))
    module = SavedModule(parameters={"weight": draw.tensor(12, 7), "bias": draw.tensor(12)})
    return AdapterWeights(
        version=version,
        saved={"leaf": module} if saved else {},
        token_rows={"leaf": draw.rows(12, 7, torch.float32)} if rows and not saved else {},
        lora={"leaf": factors} if lora else {},
    )


@given(
    draws,
    st.lists(st.tuples(*(st.booleans(),) * 4), min_size=1, max_size=3),
    st.lists(WEIGHTS, min_size=3, max_size=3),
    st.sampled_from(["linear", "embedding"]),
    st.integers(1, 13),
)
def test_members_are_what_their_combination_is(
    draw: Draw, parts: list[tuple[bool, bool, bool, bool]], weights: list[float], kind: str, step: int
):
    """combine() makes one adapter of them first; a Change has them side by side. Both are the same sum."""
    adapters = [an_adapter(draw, found, kind, str(number)) for number, found in enumerate(parts)]
    members = list(zip(adapters, weights, strict=False))
    own = {"weight": draw.tensor(12, 7), "bias": draw.tensor(12)}
    combined = AdapterChanges(combine(members, lambda _, parameter: own[parameter]))
    assert combined.places == frozenset().union(*(AdapterChanges(member).places for member, _ in members))
    lora = [(member.lora["leaf"], weight) for member, weight in members if "leaf" in member.lora]
    for place in combined.places:
        _, parameter = place
        saved = [(member.saved.get("leaf", NOT_SAVED).parameters.get(parameter), weight) for member, weight in members]
        full = tuple((tensor, weight) for tensor, weight in saved if tensor is not None)
        if parameter == "bias":
            shifts = tuple((f.bias, weight * f.scaling) for f, weight in lora if f.bias is not None)
            change = Change(full=full, shifts=shifts)
        else:
            change = Change(
                full=full,
                rows=tuple((m.token_rows["leaf"], weight) for m, weight in members if "leaf" in m.token_rows),
                factors=sum_factors("leaf", lora) if lora else None,
            )
        want = in_blocks(combined.at(place).prepared(), own[parameter], step)
        assert close(in_blocks(change.prepared(), own[parameter], step), want)
        assert close(want, dense(change, own[parameter]))


def test_an_adapter_by_itself_replaces_then_adds():
    """Its saved weight, then its rows, then its low-rank part, each as it is; biases likewise."""
    draw = Draw(Generator().manual_seed(1))
    full, bias, own = draw.tensor(12, 7, dtype=torch.bfloat16), draw.tensor(12), draw.tensor(12, 7)
    rows = draw.rows(12, 7, torch.float32)
    factors = LoraFactors(a=draw.tensor(3, 7), b=draw.tensor(12, 3), scaling=0.5, bias=draw.tensor(12))
    weights = AdapterWeights(
        version="x",
        saved={"leaf": SavedModule(parameters={"weight": full, "bias": bias, "scale": bias})},
        token_rows={"leaf": rows},
        lora={"leaf": factors},
    )
    changes = AdapterChanges(weights)
    assert changes.places == {("leaf", "weight"), ("leaf", "bias"), ("leaf", "scale")}
    want = full.float()
    want[rows.indices] = rows.rows
    got = in_blocks(changes.at(("leaf", "weight")), own, 5)
    assert close(got, want + factors.delta())
    without = AdapterChanges(AdapterWeights(version="x", saved=weights.saved, token_rows=weights.token_rows))
    assert torch.equal(in_blocks(without.at(("leaf", "weight")), own, 5), want)
    assert close(in_blocks(changes.at(("leaf", "bias")), bias, 5), bias + 0.5 * factors.bias)
    assert torch.equal(in_blocks(changes.at(("leaf", "scale")), draw.tensor(12), 5), bias)
