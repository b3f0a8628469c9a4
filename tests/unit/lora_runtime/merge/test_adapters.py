"""Merging adapters: exact where it says so, the same in any order, and refused where it makes no sense."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lora_runtime.combine import combine
from lora_runtime.errors import InvalidCombination
from lora_runtime.merge.adapters import generator_of, merge
from lora_runtime.merge.methods import METHODS_OF
from lora_runtime.merge.recipe import Recipe
from lora_runtime.merge.rules import RULES
from lora_runtime.weights import AdapterWeights, Head, LoraFactors, SavedModule, TokenRows

LEAVES = [f"model.language_model.layers.{number}.self_attn.q_proj" for number in range(4)]
EMBEDDING = "model.language_model.embed_tokens"
SHAPE, VOCABULARY, WIDTH = (14, 11), 9, 6


def base(leaf: str, parameter: str) -> torch.Tensor:
    shape = (VOCABULARY, WIDTH) if leaf == EMBEDDING else (5,) if parameter == "bias" else SHAPE
    return torch.randn(shape, generator=generator_of(7, f"{leaf}.{parameter}"))


def adapter(name: str, *, rank: int = 3, scaling: float = 0.5, leaves: list[str] | None = None) -> AdapterWeights:
    """LoRA on some leaves and on the embedding, a saved norm, a trained token and a head."""
    generator = generator_of(1, name)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    factors = {
        leaf: LoraFactors(a=draw(rank, SHAPE[1]), b=draw(SHAPE[0], rank), scaling=scaling)
        for leaf in (LEAVES if leaves is None else leaves)
    }
    factors[EMBEDDING] = LoraFactors(a=draw(rank, VOCABULARY), b=draw(WIDTH, rank), scaling=scaling, kind="embedding")
    return AdapterWeights(
        version=name * 8,
        lora=factors,
        saved={"model.language_model.norm": SavedModule(parameters={"bias": draw(5)})},
        token_rows={"lm_head": TokenRows(indices=torch.tensor([1, 4]), rows=draw(2, SHAPE[1]))},
        heads={"score": Head(name="score", weight=draw(2, 4), bias=None, labels=("no", "yes"))},
    )


def recipe(method: str, weights: dict[str, Any], **more: Any) -> Recipe:
    inputs = [{"adapter": name, "weight": weight} for name, weight in weights.items()]
    return Recipe.model_validate({"method": method, "inputs": inputs, **more})


def dense(weights: AdapterWeights) -> dict[str, torch.Tensor]:
    return {leaf: factors.delta().double() for leaf, factors in weights.lora.items()}


def assert_close(got: AdapterWeights, want: AdapterWeights, tolerance: float = 1e-5) -> None:
    assert got.modules == want.modules
    for leaf, delta in dense(want).items():
        assert float((dense(got)[leaf] - delta).norm()) <= tolerance * max(1.0, float(delta.norm())), leaf
    for leaf, module in want.saved.items():
        for parameter, tensor in module.parameters.items():
            assert torch.allclose(got.saved[leaf].parameters[parameter], tensor, atol=1e-5)


WEIGHTS = st.floats(-2, 2).map(lambda value: round(value, 3)).filter(bool)
RANKS = st.integers(1, 6)
SCALINGS = st.floats(0.05, 4)


@settings(max_examples=40)
@given(st.lists(st.tuples(RANKS, SCALINGS, WEIGHTS), min_size=1, max_size=4), st.sampled_from(["cat", "linear", "svd"]))
def test_exact_methods_are_the_dense_sum(members: list[tuple[int, float, float]], method: str):
    """Whatever the ranks and scalings; svd at a rank that holds all of it."""
    names = "abcd"[: len(members)]
    adapters = {n: adapter(n, rank=r, scaling=s) for n, (r, s, _) in zip(names, members, strict=True)}
    weights = {name: weight for name, (_, _, weight) in zip(names, members, strict=True)}
    more = {"rank": 24} if method == "svd" else {}
    merged = merge(recipe(method, weights, **more), adapters, base)
    assert_close(merged.weights, combine([(adapters[name], weight) for name, weight in weights.items()], base), 1e-4)
    for leaf, report in merged.leaves.items():
        assert report.energy == pytest.approx(1.0, abs=1e-6)
        assert report.norm == pytest.approx(float(dense(merged.weights)[leaf].norm()), rel=1e-3, abs=1e-3)


def test_weights_by_layer_and_by_module():
    adapters = {name: adapter(name) for name in "ab"}
    spread = merge(recipe("cat", {"a": [0.0, 1.0], "b": 1.0}), adapters, base)
    for number, leaf in enumerate(LEAVES):
        want = number / 3 * adapters["a"].lora[leaf].delta() + adapters["b"].lora[leaf].delta()
        assert torch.allclose(spread.weights.lora[leaf].delta(), want, atol=1e-5)
    assert torch.allclose(spread.weights.lora[EMBEDDING].delta(), adapters["b"].lora[EMBEDDING].delta(), atol=1e-5), (
        "outside of the layers, the spread's first"
    )
    by_module = [{"modules": "*.layers.2.*", "weight": -3.0}, {"modules": "*.self_attn.*", "weight": 0.5}]
    picked = merge(recipe("linear", {"a": by_module, "b": 0.001}), adapters, base)
    for leaf, weight in ((LEAVES[2], -3.0), (LEAVES[0], 0.5), (EMBEDDING, 1.0)):
        want = weight * adapters["a"].lora[leaf].delta() + 0.001 * adapters["b"].lora[leaf].delta()
        assert torch.allclose(picked.weights.lora[leaf].delta(), want, atol=1e-4)


METHODS = sorted({*RULES, "cat", "svd", "slerp"})
IN_A_SPACE = [(method, {}) for method in METHODS] + [(method, {"space": "full"}) for method in METHODS_OF["space"]]


@pytest.mark.parametrize(("method", "more"), IN_A_SPACE)
def test_the_order_and_the_company_do_not_matter(method: str, more: dict[str, str]):
    """Byte for byte: inputs turned round, and leaves merged alone."""
    adapters = {"a": adapter("a"), "b": adapter("b", rank=5, leaves=LEAVES[:2])}
    one = merge(recipe(method, {"a": 0.7, "b": 0.4}, **more), adapters, base).weights
    other = merge(recipe(method, {"b": 0.4, "a": 0.7}, **more), adapters, base).weights
    alone = {
        name: AdapterWeights(version=found.version, lora={LEAVES[0]: found.lora[LEAVES[0]]})
        for name, found in adapters.items()
    }
    single = merge(recipe(method, {"a": 0.7, "b": 0.4}, **more), alone, base).weights
    assert one.version == other.version
    for leaf, factors in one.lora.items():
        assert torch.equal(factors.a, other.lora[leaf].a) and torch.equal(factors.b, other.lora[leaf].b)
        assert torch.isfinite(factors.a).all() and torch.isfinite(factors.b).all()
    assert torch.equal(single.lora[LEAVES[0]].b, one.lora[LEAVES[0]].b)


@pytest.mark.parametrize("method", [*sorted(set(METHODS) - {name for name, rule in RULES.items() if rule.is_random})])
def test_how_a_delta_was_factored_does_not_matter(method: str):
    """B·T and T⁻¹·A in place of B and A. (Random rules draw for entries in bases whose signs are any.)"""
    adapters = {"a": adapter("a"), "b": adapter("b", rank=5)}
    turn = torch.randn(3, 3, generator=generator_of(3, "turn"))

    def turned(factors: LoraFactors) -> LoraFactors:
        a, b = torch.linalg.solve(turn, factors.a), factors.b @ turn * 4
        return LoraFactors(a=a, b=b, scaling=factors.scaling / 4, kind=factors.kind)

    again = replace(adapters["a"], lora={leaf: turned(factors) for leaf, factors in adapters["a"].lora.items()})
    found = recipe(method, {"a": 0.7, "b": 0.4}, **({"density": 0.6} if method in METHODS_OF["density"] else {}))
    one, other = (merge(found, {**adapters, "a": first}, base).weights for first in (adapters["a"], again))
    assert_close(one, other, 1e-4)


def test_core_tsv_is_tsv_in_the_core():
    adapters = {"a": adapter("a"), "b": adapter("b", rank=5)}
    one, other = (merge(recipe(m, {"a": 0.7, "b": -0.4}), adapters, base).weights for m in ("core_tsv", "tsv"))
    for leaf, factors in one.lora.items():
        assert torch.equal(factors.a, other.lora[leaf].a) and torch.equal(factors.b, other.lora[leaf].b)
    assert one.version != other.version


def test_a_recipe_is_what_the_result_is_known_by():
    adapters = {name: adapter(name) for name in "ab"}
    first = merge(recipe("ties", {"a": 0.5, "b": 0.5}), adapters, base).weights.version
    for other in (
        recipe("ties", {"a": 0.5, "b": 0.6}),
        recipe("ties", {"a": 0.5, "b": 0.5}, density=0.4),
        recipe("ties", {"a": 0.5, "b": 0.5}, convention="peft"),
        recipe("dare_ties", {"a": 0.5, "b": 0.5}),
    ):
        assert merge(other, adapters, base).weights.version != first


def test_matrices_of_different_shapes_are_refused():
    other = adapter("b")
    wrong = LoraFactors(a=torch.zeros(2, 5), b=torch.zeros(SHAPE[0], 2), scaling=1.0)
    clashing = AdapterWeights(version="x", lora={**other.lora, LEAVES[1]: wrong})
    with pytest.raises(InvalidCombination, match=r"layers\.1.*14 x 5, 14 x 11"):
        merge(recipe("ties", {"a": 1.0, "b": 1.0}), {"a": adapter("a"), "b": clashing}, base)


@pytest.mark.parametrize(
    ("method", "weights", "more", "said"),
    [
        ("cat", {"a": float("nan")}, {}, "finite"),
        ("cat", {"a": 1e9}, {}, "less than or equal"),
        ("cat", {}, {}, "at least 1"),
        ("cat", {"a": 1.0}, {"rank": 4}, "takes no rank"),
        ("cat", {"a": 1.0}, {"scale": 0}, "leave nothing"),
        ("slerp", {"a": 1.0}, {}, "takes two"),
        ("core_tsv", {"a": 1.0, "b": 1.0}, {"space": "full"}, "leave 'space' out"),
        ("karcher", {"a": 1.0, "b": -1.0}, {}, "above 0"),
        ("karcher", {"a": 1.0, "b": [0.0, 1.0]}, {}, "above 0"),
        ("della", {"a": 1.0}, {"density": 0.05, "epsilon": 0.2}, "small enough"),
        ("ties", {"a": 1.0}, {"density": 0.0}, "greater than 0"),
        ("ties", {"a": 1.0}, {"dencity": 0.5}, "dencity"),
        ("magic", {"a": 1.0}, {}, "method"),
    ],
)
def test_a_recipe_that_makes_no_sense(method: str, weights: dict[str, Any], more: dict[str, Any], said: str):
    with pytest.raises(ValidationError, match=said):
        recipe(method, weights, **more)
