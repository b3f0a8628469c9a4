"""Combinations, leaf by leaf, against the sum of each member's own change in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_runtime.combine import combine, combined_version
from lora_runtime.errors import InvalidCombination
from lora_runtime.weights import AdapterWeights, Head, LoraFactors, SavedModule, TokenRows

OUT, IN, V, D = 6, 5, 9, 4
BASE = {
    ("linear", "weight"): torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1)),
    ("linear", "bias"): torch.randn(OUT, generator=torch.Generator().manual_seed(2)),
    ("embedding", "weight"): torch.randn(V, D, generator=torch.Generator().manual_seed(3)),
    ("head", "weight"): torch.randn(V, D, generator=torch.Generator().manual_seed(4)),
}


def base(leaf: str, parameter: str) -> Tensor:
    return BASE[leaf, parameter]


@st.composite
def adapters(draw: st.DrawFn) -> AdapterWeights:
    seed = draw(st.integers(0, 2**31))
    g = torch.Generator().manual_seed(seed)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    lora, saved, rows = {}, {}, {}
    rank = draw(st.integers(1, 4))
    if draw(st.booleans()):
        bias = noise(OUT) if draw(st.booleans()) else None
        lora["linear"] = LoraFactors(a=noise(rank, IN), b=noise(OUT, rank), scaling=draw(st.floats(-3, 3)), bias=bias)
    if draw(st.booleans()):
        saved["linear"] = SavedModule(
            parameters={
                p: noise(*BASE["linear", p].shape) for p in draw(st.sampled_from([["weight", "bias"], ["bias"]]))
            }
        )
    for leaf in ("embedding", "head"):
        kind = draw(st.sampled_from(["none", "lora", "saved", "rows"]))
        if kind == "lora" and leaf == "embedding":
            lora[leaf] = LoraFactors(a=noise(rank, V), b=noise(D, rank), scaling=0.5, kind="embedding")
        elif kind == "lora":
            lora[leaf] = LoraFactors(a=noise(rank, D), b=noise(V, rank), scaling=2.0)
        elif kind == "saved":
            saved[leaf] = SavedModule(parameters={"weight": noise(V, D)})
        elif kind == "rows":
            ids = draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=4, unique=True))
            rows[leaf] = TokenRows(indices=torch.tensor(ids), rows=noise(len(ids), D))
    return AdapterWeights(version=str(seed), lora=lora, saved=saved, token_rows=rows)


def changes(adapter: AdapterWeights) -> dict[tuple[str, str], Tensor]:
    """What an adapter adds to each parameter, in fp64."""
    found = {key: torch.zeros(tensor.shape, dtype=torch.float64) for key, tensor in BASE.items()}
    for name, module in adapter.saved.items():
        for parameter, tensor in module.parameters.items():
            found[name, parameter] += tensor.double() - BASE[name, parameter].double()
    for name, rows in adapter.token_rows.items():
        for at, row in zip(rows.indices.tolist(), rows.rows, strict=True):
            found[name, "weight"][at] += row.double() - BASE[name, "weight"][at].double()
    for name, f in adapter.lora.items():
        delta = f.scaling * (f.b.double() @ f.a.double())
        found[name, "weight"] += delta.T if f.kind == "embedding" else delta
        if f.bias is not None:
            found[name, "bias"] += f.scaling * f.bias.double()
    return found


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(adapters(), st.floats(-2, 2, width=32)), min_size=1, max_size=4))
def test_deltas_add(members: list[tuple[AdapterWeights, float]]) -> None:
    total = combine(members, base)
    parts = [(changes(adapter), share) for adapter, share in members]
    got = changes(total)
    for key in BASE:
        want = sum(share * part[key] for part, share in parts)
        assert torch.allclose(got[key], want, atol=1e-4), key
    assert not any(tensor.dtype == torch.bfloat16 for tensor in total.tensors()), "sums are kept in fp32"
    for name in total.token_rows:
        assert name not in total.lora
        assert name not in total.saved, "one way per leaf, or PEFT could not hold it"


def test_members_are_not_touched() -> None:
    weight = torch.ones(V, D)
    one = AdapterWeights(version="1", saved={"head": SavedModule(parameters={"weight": weight})})
    rows = TokenRows(indices=torch.tensor([2]), rows=torch.full((1, D), 7.0))
    two = AdapterWeights(version="2", token_rows={"head": rows})
    before = BASE["head", "weight"].clone()
    combine([(one, 1.0), (two, 1.0)], base)
    assert torch.equal(weight, torch.ones(V, D))
    assert torch.equal(BASE["head", "weight"], before)


def head(scale: float, labels: tuple[str, ...] = ("a", "b"), bias: bool = True) -> AdapterWeights:
    found = Head(
        name="score", weight=torch.full((2, 3), scale), bias=torch.full((2,), scale) if bias else None, labels=labels
    )
    return AdapterWeights(version=f"{scale}", heads={"score": found})


def test_heads_with_equal_labels_add() -> None:
    total = combine([(head(1.0), 0.5), (head(4.0, bias=False), 0.25)], base).heads["score"]
    assert torch.equal(total.weight, torch.full((2, 3), 1.5))
    assert total.bias is not None
    assert torch.equal(total.bias, torch.full((2,), 0.5))
    assert total.labels == ("a", "b")


def test_heads_with_other_labels_do_not() -> None:
    with pytest.raises(InvalidCombination, match="different labels"):
        combine([(head(1.0), 0.5), (head(1.0, labels=("b", "a")), 0.5)], base)


def test_a_head_of_one_member_keeps_its_place() -> None:
    other = AdapterWeights(version="x")
    assert torch.equal(combine([(head(2.0), 1.0), (other, 0.5)], base).heads["score"].weight, torch.full((2, 3), 2.0))


def test_the_version_is_that_of_the_recipe() -> None:
    assert combined_version([("a", 0.5), ("b", 0.25)]) == combined_version([("b", 0.25), ("a", 0.5)])
    recipes = [[("a", 0.5)], [("a", 0.25)], [("b", 0.5)], [("a", 0.5), ("a", 0.5)], [("a", 0.5), ("b", 0.5)]]
    assert len({combined_version(recipe) for recipe in recipes}) == len(recipes)
