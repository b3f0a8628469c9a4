"""Each merge method from recipe to published folder, read back by PEFT, against a second implementation of its paper;
and each rule broken in turn: the merge is not published then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Generator, Tensor

from lora_runtime.folder import fingerprint
from lora_runtime.merge import adapters as merging
from lora_runtime.merge import agreement, planning
from lora_runtime.merge.methods import Options
from lora_runtime.merge.reference import STATEMENTS
from lora_runtime.merge.rules import RULES
from serve.config import Settings
from serve.registry.merges import MergeState
from tests.oracle import papers
from tests.oracle.jobs import deltas_of, made, settings_of
from tests.oracle.models import save_adapter, tiny_qwen2vl

TARGETS = r".*language_model\.layers\.\d\.(self_attn\.k_proj|mlp\.down_proj)"
WEIGHTS: dict[str, tuple[Any, ...]] = {
    "positive": (0.7, 0.4, 1.1),
    "negative": (-0.7, -0.4, -1.1),
    "mixed": (0.5, -0.499, 0.3),
    "tiny": (1e-6, -2e-6, 3e-6),
    "zero": (0.8, 0.0, -0.5),
    "zero for some modules": (0.8, [{"modules": "*.mlp.*", "weight": 0}, {"modules": "*", "weight": -0.4}], 0.6),
    "spread": ([0.0, 1.0], [0.7, -0.7], 0.5),
    "one": (-1.0,),
}
SIGNED = [name for name in WEIGHTS if name != "positive"]
RECIPES: dict[str, dict[str, Any]] = {
    "cat": {"method": "cat"},
    "linear": {"method": "linear", "scale": -1.5},
    "svd": {"method": "svd", "rank": 3},
    "magnitude_prune": {"method": "magnitude_prune", "density": 0.4},
    "ties": {"method": "ties", "density": 0.4, "scale": 2.0},
    "ties, full": {"method": "ties", "density": 0.4, "space": "full"},
    "ties, whole": {"method": "ties", "density": 1.0},
    "ties, peft": {"method": "ties", "density": 0.6, "convention": "peft"},
    "dare_linear": {"method": "dare_linear", "density": 0.6, "seed": 3},
    "dare_linear, mergekit": {"method": "dare_linear", "density": 0.6, "convention": "mergekit"},
    "dare_ties": {"method": "dare_ties", "density": 0.6},
    "dare_ties, full": {"method": "dare_ties", "density": 0.6, "space": "full", "seed": 9},
    "dare_ties, mergekit": {"method": "dare_ties", "density": 0.6, "convention": "mergekit"},
    "della": {"method": "della", "density": 0.6, "epsilon": 0.3},
    "breadcrumbs": {"method": "breadcrumbs", "density": 0.6, "gamma": 0.05},
    "tsv": {"method": "tsv"},
    "core_tsv": {"method": "core_tsv"},
    "iso_c": {"method": "iso_c"},
    "robust_merge": {"method": "robust_merge", "density": 0.5},
}
POSITIVE: dict[str, dict[str, Any]] = {
    "karcher": {"method": "karcher"},
    "ties, mergekit": {"method": "ties", "density": 0.4, "convention": "mergekit"},
    "della, mergekit": {"method": "della", "density": 0.6, "epsilon": 0.2, "convention": "mergekit"},
}
QUICK = [("ties", "mixed"), ("dare_ties, full", "spread"), ("della", "zero for some modules"), ("linear", "one")]
EVERY = [(name, "positive") for name in (*RECIPES, *POSITIVE)] + [(name, sign) for name in RECIPES for sign in SIGNED]
CASES = [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in EVERY]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("methods") / "base"
    tiny_qwen2vl().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inputs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """In the order of their versions."""
    root = tmp_path_factory.mktemp("inputs")
    configs = [{"r": 4}, {"r": 3, "use_rslora": True}, {"r": 2, "lora_alpha": 5, "rank_pattern": {"down_proj": 5}}]
    folders = [
        save_adapter(tiny_qwen2vl, LoraConfig(target_modules=TARGETS, **config), root / str(seed), seed=seed)
        for seed, config in enumerate(configs)
    ]
    return sorted(folders, key=fingerprint)


@pytest.fixture(scope="module")
def given_(base: Path, inputs: list[Path]) -> list[dict[str, Tensor]]:
    return [deltas_of(base, folder) for folder in inputs]


@pytest.fixture
def settings(tmp_path: Path, base: Path) -> Settings:
    return settings_of(tmp_path / "state", base)


def recipe_of(inputs: list[Path], weights: tuple[Any, ...], recipe: dict[str, Any], **more: Any) -> dict[str, Any]:
    said = [{"adapter": str(f), "weight": w} for f, w in zip(inputs[: len(weights)], weights, strict=True)]
    return {"inputs": said, "verify": {"probes": False}, **recipe, **more}


def weight_at(weight: Any, leaf: str) -> float:
    if isinstance(weight, float):
        return weight
    if isinstance(weight[0], dict):
        return 0.0 if ".mlp." in leaf else -0.4
    return float(weight[0] if ".layers.0." in leaf else weight[1])


@pytest.mark.parametrize(("name", "sign"), CASES, ids=lambda value: value)
def test_what_is_published_is_what_the_paper_says(
    base: Path, inputs: list[Path], given_: list[dict[str, Tensor]], settings: Settings, tmp_path: Path, name: str,
    sign: str,
):  # fmt: skip
    recipe, weights = {**RECIPES, **POSITIVE}[name], WEIGHTS[sign]
    job = made(settings, recipe_of(inputs, weights, recipe), tmp_path / "out")
    assert job.state is MergeState.SUCCEEDED, job.error
    got = deltas_of(base, tmp_path / "out")
    for leaf in given_[0]:
        at = [weight_at(weight, leaf) for weight in weights]
        if not any(at):
            assert leaf not in got
            continue
        deltas = [one[leaf].numpy() for one in given_[: len(weights)]]
        want = recipe.get("scale", 1.0) * papers.merged(leaf, deltas, at, recipe)
        if "rank" in recipe:
            want = papers.truncated(want, recipe["rank"])
        assert np.linalg.norm(want) > 1e-8
        assert np.linalg.norm(got[leaf].numpy() - want) < 1e-4 * np.linalg.norm(want), leaf
    assert set(got) <= set(given_[0])
    assert job.report is not None
    assert job.report["verification"]["method"] == {"checked": len(got), "passed_over": 0}


def turned(result: Tensor) -> Tensor:
    return -result


def larger(result: Tensor) -> Tensor:
    return result * 1.01


BREAKS: dict[str, Callable[[Tensor], Tensor]] = {"a wrong sign": turned, "a factor": larger}


@pytest.mark.parametrize(
    "rule", [rule if rule == "ties" else pytest.param(rule, marks=pytest.mark.slow) for rule in sorted(RULES)]
)
@pytest.mark.parametrize("harm", [*BREAKS, "a skipped adapter", "a weight's sign lost"])
def test_a_rule_that_is_wrong_publishes_nothing(
    inputs: list[Path], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, harm: str
):
    """And the rule as it is passes, with the same recipe."""
    right = RULES[rule]
    weights = (0.7, 0.4, 1.1) if rule == "karcher" else (0.7, -0.4, 1.1)
    if rule == "karcher" and harm == "a weight's sign lost":
        pytest.skip("it takes no negative weights")

    def wrong(deltas: Tensor, shares: Tensor, options: Options, generator: Generator) -> Tensor:
        if harm == "a skipped adapter":
            return right.apply(deltas[1:], shares[1:], options, generator)
        if harm == "a weight's sign lost":
            return right.apply(deltas, shares.abs(), options, generator)
        return BREAKS[harm](right.apply(deltas, shares, options, generator))

    broken = MappingProxyType({**RULES, rule: replace(right, apply=wrong)})
    recipe = recipe_of(inputs, weights, {"method": rule})
    monkeypatch.setattr(merging, "RULES", broken)
    job = made(settings, recipe, tmp_path / "out")
    assert job.state is MergeState.FAILED and not (tmp_path / "out").exists()
    assert job.error is not None and f"is not what '{rule}' makes of it" in job.error, job.error
    monkeypatch.undo()
    assert made(settings, recipe, tmp_path / "out").state is MergeState.SUCCEEDED


def test_what_is_too_large_to_check_is_told(
    inputs: list[Path], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of the two kinds of modules, k_proj has 3 x 64 x 128 entries and down_proj more."""
    monkeypatch.setattr(agreement, "MAX_VALUES", 3 * 64 * 128)
    monkeypatch.setattr(planning, "MAX_VALUES", 3 * 64 * 128)
    recipe = recipe_of(inputs, WEIGHTS["mixed"], {"method": "ties", "space": "full"})
    job = made(settings, recipe, tmp_path / "out")
    assert job.report is not None and job.report["verification"]["method"] == {"checked": 2, "passed_over": 2}
    assert any("2 of 4 modules have more than 24,576 entries" in warning for warning in job.report["warnings"])


@pytest.mark.parametrize("product", ["adapter", "checkpoint"])
def test_a_division_by_signed_weights_is_found_out(
    inputs: list[Path], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, product: str
):
    """What TIES did with a negative weight once, and was published as verified."""

    def signed(deltas: Tensor, weights: Tensor, options: Options, generator: Generator) -> Tensor:
        weighted = deltas * weights[:, None, None]
        sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
        agrees = weighted.sign() == sign
        shares = (weights[:, None, None] * agrees).sum(0)
        return (weighted * agrees).sum(0) / torch.where(shares.abs() < 1e-8, 1.0, shares)

    monkeypatch.setattr(merging, "RULES", {**RULES, "ties": replace(RULES["ties"], apply=signed)})
    recipe = recipe_of(inputs, (-1.0,), {"method": "ties", "density": 1.0, "product": product})
    job = made(settings, recipe, tmp_path / "out")
    assert job.state is MergeState.FAILED
    assert "is not what 'ties' makes of it" in (job.error or ""), job.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("harm", ["another basis", "a delta left out"])
def test_a_core_that_is_wrong_publishes_nothing(
    inputs: list[Path], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
):
    right = merging.core_of

    def wrong(members: Any) -> Any:
        core = right(members)
        if harm == "a delta left out":
            return replace(core, cores_TPQ=core.cores_TPQ * torch.tensor([1.0, 0.0])[:, None, None])
        turn = torch.linalg.qr(torch.randn(core.left_MP.shape[1], core.left_MP.shape[1], dtype=torch.float64)).Q
        return replace(core, left_MP=core.left_MP @ turn.float(), cores_TPQ=turn.T @ core.cores_TPQ)

    monkeypatch.setattr(merging, "core_of", wrong)
    job = made(settings, recipe_of(inputs, (0.5, 0.5), {"method": "ties"}), tmp_path / "out")
    assert job.state is MergeState.FAILED and "is not in a core" in (job.error or ""), job.error


@pytest.mark.slow
@pytest.mark.parametrize("product", ["adapter", "checkpoint"])
@pytest.mark.parametrize("method", ["ties", "dare_ties", "iso_c"])
def test_with_probes_it_is_published_too(
    inputs: list[Path], settings: Settings, tmp_path: Path, method: str, product: str
):
    recipe = recipe_of(inputs, WEIGHTS["zero for some modules"], {"method": method, "product": product}, verify={})
    job = made(settings, recipe, tmp_path / "out")
    assert job.state is MergeState.SUCCEEDED, job.error
    assert job.report is not None and job.report["verification"]["probe"]["kl_to_base"] > 0


@pytest.mark.parametrize("rule", sorted(RULES))
def test_what_verification_states_is_what_the_paper_says(rule: str):
    """The statement itself, against the same second implementation, on dense deltas."""
    random = np.random.default_rng(7)
    deltas = random.standard_normal((3, 6, 7))
    deltas[0] = deltas[0, :, :2] @ deltas[0, :2, :]
    weights = [0.5, 0.3, 0.8] if rule == "karcher" else [0.5, -0.3, 0.8]
    conventions = {"ties": ["loom", "peft"], "dare_linear": ["mergekit"], "dare_ties": ["loom", "peft", "mergekit"]}
    for convention in conventions.get(rule, ["loom"]):
        options = Options(density=0.6, epsilon=0.2, gamma=0.1, convention=convention)  # type: ignore[arg-type]
        recipe = {"method": rule, "space": "full", "density": 0.6, "gamma": 0.1, "convention": convention}
        draws = np.stack(papers.uniforms(0, "x", 3, (6, 7)))
        got = STATEMENTS[rule](deltas, np.array(weights), options, draws)
        assert np.allclose(got, papers.merged("x", list(deltas), weights, recipe), atol=1e-7), convention
