"""What weights of any sign and size do to each rule, and that each is what its independent statement says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_runtime.errors import InvalidCombination, VerificationFailed
from lora_runtime.merge.adapters import generator_of, merge
from lora_runtime.merge.methods import METHODS_OF, Convention, Options
from lora_runtime.merge.recipe import Recipe
from lora_runtime.merge.reference import STATEMENTS, drawn
from lora_runtime.merge.rules import RULES, independence
from lora_runtime.weights import AdapterWeights, Head, LoraFactors, SavedModule, TokenRows

SEEDS = st.integers(0, 10**6)
SIZES = st.sampled_from([0.0, 1e-12, 1e-6, 1e-3, 0.3, 0.499, 0.5, 1.0, 1.7, 1e3])
WEIGHT = st.tuples(SIZES, st.sampled_from([1, -1])).map(lambda pair: pair[0] * pair[1])
WEIGHTS = st.lists(WEIGHT, min_size=1, max_size=4).filter(lambda weights: any(weights))
DENSITIES = st.sampled_from([0.15, 0.5, 0.8, 1.0])
CONVENTIONS: dict[str, list[Convention]] = {
    "ties": ["loom", "peft"],
    "dare_linear": ["loom", "mergekit"],
    "dare_ties": ["loom", "peft", "mergekit"],
}
EACH = [(rule, convention) for rule in RULES for convention in CONVENTIONS.get(rule, ["loom"])]
MEANS = [("ties", "loom"), ("dare_ties", "loom"), ("della", "loom")]
SUMS = ["linear", "magnitude_prune", "dare_linear", "breadcrumbs"]


def deltas(seed: int, count: int, rows: int = 8, columns: int = 9) -> Tensor:
    """Of ranks 3, 2, 3, 2: low, as adapters' are."""
    random = torch.Generator().manual_seed(seed)
    parts = [(3 - number % 2) for number in range(count)]
    draw = [
        torch.randn(rows, rank, generator=random, dtype=torch.float64)
        @ torch.randn(rank, columns, generator=random, dtype=torch.float64)
        for rank in parts
    ]
    return torch.stack(draw)


def apply(rule: str, stacked: Tensor, weights: list[float], **options: Any) -> Tensor:
    said = {"density": 0.6, "epsilon": 0.1, **options}
    tensor = torch.tensor(weights, dtype=torch.float64)
    return RULES[rule].apply(stacked, tensor, Options(**said), generator_of(0, "x"))


def near(got: Tensor, want: Tensor, size: float = 0.0) -> bool:
    return float((got - want).norm()) <= 1e-9 * max(float(want.norm()), size)


def fit(rule: str, weights: list[float]) -> list[float]:
    return [abs(weight) or 1.0 for weight in weights] if RULES[rule].needs_positive else weights


@pytest.mark.parametrize(("rule", "convention"), EACH)
@settings(max_examples=60)
@given(seed=SEEDS, weights=WEIGHTS, density=DENSITIES)
def test_a_rule_is_what_its_statement_says(
    rule: str, convention: Convention, seed: int, weights: list[float], density: float
):
    weights = fit(rule, weights)
    stacked = deltas(seed, len(weights))
    options = {"density": density, "epsilon": 0.1, "gamma": 0.1, "convention": convention}
    got = apply(rule, stacked, weights, **options)
    want = STATEMENTS[rule](stacked.numpy(), np.array(weights), Options(**options), drawn(0, "x", tuple(stacked.shape)))
    assert near(got, torch.from_numpy(want), 1e-6 * sum(map(abs, weights)))


@pytest.mark.parametrize(("rule", "convention"), [each for each in EACH if not RULES[each[0]].needs_positive])
@given(seed=SEEDS, weights=WEIGHTS, density=DENSITIES)
def test_weights_turned_round_turn_the_result_round(
    rule: str, convention: Convention, seed: int, weights: list[float], density: float
):
    stacked = deltas(seed, len(weights))
    options = {"density": density, "convention": convention}
    one = apply(rule, stacked, weights, **options)
    assert near(apply(rule, stacked, [-weight for weight in weights], **options), -one, 1e-6)


@pytest.mark.parametrize(("rule", "convention"), EACH)
@given(seed=SEEDS, weights=WEIGHTS, factor=st.sampled_from([1e-3, 0.5, 3.0]))
def test_weights_times_a_constant(rule: str, convention: Convention, seed: int, weights: list[float], factor: float):
    """A sum grows with them; a mean is of shares, and does not."""
    weights = fit(rule, weights)
    stacked = deltas(seed, len(weights))
    one, other = (apply(rule, stacked, w, convention=convention) for w in (weights, [factor * w for w in weights]))
    is_mean = (rule, convention) in MEANS or rule == "karcher"
    assert near(other, one if is_mean else factor * one, 1e-6)


@pytest.mark.parametrize(("rule", "convention"), EACH)
@given(seed=SEEDS, weight=WEIGHT.filter(bool))
def test_one_adapter_alone_at_full_density(rule: str, convention: Convention, seed: int, weight: float):
    """w·D where weights add, sgn(w)·D where they are shares."""
    (weight,) = fit(rule, [weight])
    (delta,) = stacked = deltas(seed, 1)
    got = apply(rule, stacked, [weight], density=1.0, gamma=0.0, convention=convention)
    if rule == "iso_c":
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        assert near(got, weight * s[:3].mean() * u[:, :3] @ v[:3])
    elif (rule, convention) in MEANS or rule == "karcher":
        assert near(got, delta if weight > 0 else -delta)
    else:
        assert near(got, weight * delta)


@pytest.mark.parametrize(("rule", "convention"), EACH)
@given(seed=SEEDS, weights=st.lists(st.floats(0.1, 2), min_size=2, max_size=2))
def test_two_equal_adapters(rule: str, convention: Convention, seed: int, weights: list[float]):
    """Their sum where weights add, their mean where directions are shared out."""
    (delta,) = deltas(seed, 1)
    got = apply(rule, torch.stack([delta, delta]), weights, density=1.0, gamma=0.0, convention=convention)
    total = sum(weights)
    if rule == "iso_c":
        assert near(got, apply(rule, delta[None], [total]))
    elif (rule, convention) in MEANS or rule == "karcher":
        assert near(got, delta)
    elif rule in ("tsv", "robust_merge") or (rule, convention) in [("ties", "peft"), ("dare_ties", "peft")]:
        assert near(got, total / 2 * delta)
    else:
        assert near(got, total * delta)


@pytest.mark.parametrize(("rule", "convention"), EACH)
@given(seed=SEEDS)
def test_a_delta_and_its_opposite(rule: str, convention: Convention, seed: int):
    """Nothing, by any way to write it; a mean of directions is refused."""
    (delta,) = deltas(seed, 1)
    if rule == "karcher":
        with pytest.raises(InvalidCombination, match="opposite directions"):
            apply(rule, torch.stack([delta, -delta]), [1.0, 0.5])
        return
    for stacked, weights in ((torch.stack([delta, -delta]), [0.7, 0.7]), (torch.stack([delta, delta]), [0.7, -0.7])):
        if convention in ("peft", "mergekit") and rule in ("ties", "dare_ties"):
            continue  # a tie elects plus in those tools
        got = apply(rule, stacked, weights, density=1.0, gamma=0.0, convention=convention)
        assert float(got.norm()) < 1e-9 * float(delta.norm())


@pytest.mark.parametrize(("rule", "convention"), MEANS)
@given(seed=SEEDS, weights=WEIGHTS, density=DENSITIES)
def test_a_mean_is_no_larger_than_what_it_is_of(
    rule: str, convention: Convention, seed: int, weights: list[float], density: float
):
    """Whatever the weights' signs: (0.5, -0.499) made it hundreds of times as large once."""
    stacked = deltas(seed, len(weights))
    got = apply(rule, stacked, weights, density=density, convention=convention)
    rescaled = 1.0 if rule == "ties" or density >= 1 else 1 / (density - 0.05 * (rule == "della"))
    assert bool((got.abs() <= rescaled * stacked.abs().amax(0) * (1 + 1e-9)).all())


@given(SEEDS, WEIGHTS)
def test_sizes_of_the_others(seed: int, weights: list[float]):
    stacked, added = deltas(seed, len(weights)), 0.0
    norms = [float(delta.norm()) for delta in stacked]
    added = sum(abs(w) * norm for w, norm in zip(weights, norms, strict=True))
    for rule in ("linear", "magnitude_prune", "breadcrumbs"):
        assert float(apply(rule, stacked, weights).norm()) <= added * (1 + 1e-9)
    assert float(apply("ties", stacked, weights, convention="peft").norm()) <= added * (1 + 1e-9)
    values = torch.linalg.svdvals(apply("tsv", stacked, weights))
    largest = max(abs(w) * float(torch.linalg.svdvals(d)[0]) for w, d in zip(weights, stacked, strict=True))
    assert float(values[0]) <= largest * len(weights) * (1 + 1e-9)
    positive = fit("karcher", weights)
    assert float(apply("karcher", stacked, positive).norm()) <= max(norms) * (1 + 1e-9)


@given(SEEDS, st.sampled_from([1e-9, -1e-9]), st.sampled_from(SUMS))
def test_sums_do_not_jump_at_weight_0(seed: int, weight: float, rule: str):
    stacked = deltas(seed, 2)
    assert near(apply(rule, stacked, [1.0, weight]), apply(rule, stacked, [1.0, 0.0]), 1e3)


@given(SEEDS, st.sampled_from([1e-9, -1e-9]))
def test_ties_jumps_at_weight_0_only_where_nothing_else_votes(seed: int, weight: float):
    """As its docstring says: there, a small weight's entry is whole, and weight 0's is nothing."""
    stacked = deltas(seed, 2)
    one, other = (apply("ties", stacked, [1.0, w], density=1.0) for w in (weight, 0.0))
    assert float((one - other).norm()) < 1e-6 * float(stacked[1].norm())
    stacked[0, 0] = 0.0
    alone = apply("ties", stacked, [1.0, weight * 1e5], density=1.0)[0]
    there = stacked[1, 0].abs() > 0.1
    assert near(alone[there], (1 if weight > 0 else -1) * stacked[1, 0][there])
    assert not apply("ties", stacked, [1.0, 0.0], density=1.0)[0].any()


def test_independence_is_what_it_says():
    basis = torch.linalg.qr(deltas(1, 1)[0] + torch.eye(8, 9, dtype=torch.float64)).Q[:, :8]
    one, other = torch.outer(basis[:, 0], basis[:, 1]), torch.outer(basis[:, 2], basis[:, 3])
    assert independence(torch.stack([one, other])) == pytest.approx(1.0)
    assert independence(torch.stack([one, 3 * one])) < 1e-9
    tilted = torch.outer(basis[:, 0] + 0.1 * basis[:, 2], basis[:, 3])
    assert independence(torch.stack([one, tilted])) == pytest.approx(0.05, rel=0.01)


def everything(name: str) -> AdapterWeights:
    random = generator_of(2, name)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    leaves = [f"model.language_model.layers.{n}.self_attn.q_proj" for n in range(2)]
    return AdapterWeights(
        version=name * 8,
        lora={leaf: LoraFactors(a=draw(2, 11), b=draw(14, 2), scaling=0.5, bias=draw(14)) for leaf in leaves},
        saved={"model.language_model.norm": SavedModule(parameters={"weight": draw(5)})},
        token_rows={"lm_head": TokenRows(indices=torch.tensor([1, 4]), rows=draw(2, 11))},
        heads={"score": Head(name="score", weight=draw(2, 4), bias=None, labels=("no", "yes"))},
    )


def base(leaf: str, parameter: str) -> Tensor:
    return torch.ones((9, 11) if leaf == "lm_head" else (5,))


@pytest.mark.parametrize("method", sorted({*RULES, "cat", "svd"}))
@pytest.mark.parametrize("place", ["*", "*.layers.0.*", "*norm", "lm_head", "score"])
def test_weight_0_is_absence(method: str, place: str):
    """Wherever an adapter weighs nothing, the others are merged as if it were not there, bit for bit."""
    adapters = {name: everything(name) for name in "abc"}

    def merged(weight: Any, there: dict[str, AdapterWeights]) -> AdapterWeights:
        weights = {"a": 0.7, "b": weight, "c": 0.4}
        inputs = [{"adapter": name, "weight": weights[name]} for name in there]
        return merge(Recipe.model_validate({"method": method, "inputs": inputs}), there, base).weights

    got = merged([{"modules": place, "weight": 0}, {"modules": "*", "weight": 0.3}], adapters)
    absent = merged(0.3, {name: one for name, one in adapters.items() if name != "b"})
    present = merged(0.3, adapters)
    for kind in ("lora", "saved", "token_rows", "heads"):
        found = getattr(got, kind)
        for name in getattr(present, kind):
            is_out = place == "*" or name == place or (place == "*.layers.0.*" and ".0." in name)
            is_out = is_out or (place == "*norm" and name.endswith("norm"))
            want = getattr(absent if is_out else present, kind)[name]
            pairs = zip(tensors(found[name]), tensors(want), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs), (kind, name)


def tensors(part: Any) -> list[Tensor]:
    if isinstance(part, LoraFactors):
        return [part.a, part.b, part.bias if part.bias is not None else torch.zeros(1)]
    if isinstance(part, SavedModule):
        return list(part.parameters.values())
    return [part.rows, part.indices] if isinstance(part, TokenRows) else [part.weight]


@pytest.mark.parametrize("method", sorted({*RULES, "cat", "svd"}))
@pytest.mark.parametrize("which", ["one", "all"])
def test_adapters_that_do_nothing_yet_are_merged(method: str, which: str):
    """Fresh ones, whose B is zero, and one that has the rank of its whole leaf."""
    adapters = {name: everything(name) for name in "ab"}
    for name in adapters if which == "all" else "a":
        nothing = {leaf: replace(f, b=torch.zeros_like(f.b)) for leaf, f in adapters[name].lora.items()}
        adapters[name] = replace(adapters[name], lora=nothing)
    if which == "one":
        (leaf, *_) = adapters["b"].lora
        square = torch.randn(14, 11, generator=generator_of(5, "b"))
        whole = replace(adapters["b"].lora[leaf], a=torch.eye(11), b=square)
        adapters["b"] = replace(adapters["b"], lora={**adapters["b"].lora, leaf: whole})
    inputs = [{"adapter": name} for name in adapters]
    got = merge(Recipe.model_validate({"method": method, "inputs": inputs}), adapters, base).weights
    assert all(bool(factors.delta().any()) is (which == "one") for factors in got.lora.values())


def test_what_overflows_is_told_as_that():
    adapters = {name: everything(name) for name in "ab"}
    huge = {leaf: replace(f, b=f.b * 1e37, a=f.a * 1e3) for leaf, f in adapters["a"].lora.items()}
    adapters["a"] = replace(adapters["a"], lora=huge)
    inputs = [{"adapter": name, "weight": 1e4} for name in adapters]
    with pytest.raises(VerificationFailed, match="too large for fp32"):
        merge(Recipe.model_validate({"method": "cat", "inputs": inputs}), adapters, base)


@pytest.mark.parametrize("method", ["cat", "linear", "ties", "iso_c"])
def test_where_every_weight_is_0_nothing_is_left(method: str):
    adapters = {name: everything(name) for name in "ab"}
    nowhere = [{"modules": "*.layers.0.*", "weight": 0}, {"modules": "*norm", "weight": 0.0}]
    inputs = [{"adapter": name, "weight": nowhere} for name in adapters]
    got = merge(Recipe.model_validate({"method": method, "inputs": inputs}), adapters, base).weights
    assert got.modules == {"model.language_model.layers.1.self_attn.q_proj", "lm_head"} and set(got.heads) == {"score"}


def test_the_table_of_options_knows_the_rules():
    assert {rule for rule in RULES if RULES[rule].is_elementwise} == set(METHODS_OF["space"])
    assert {rule for rule in RULES if RULES[rule].is_random} == set(METHODS_OF["seed"])
    assert STATEMENTS.keys() == RULES.keys()
