"""Plans: what they say of a merge before it is done, and everything that is refused there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLForConditionalGeneration

from lora_runtime.checkpoint import fingerprint, read_adapter
from lora_runtime.errors import MergeRefused
from lora_runtime.export import write_adapter
from lora_runtime.layout import BaseLayout
from lora_runtime.merge.adapters import merge
from lora_runtime.merge.job import JobRecipe, Plan
from lora_runtime.merge.planning import Located, opened, plan_of
from lora_runtime.merge.recipe import Method, Recipe
from tests.oracle.models import logits_of, sample_inputs, save_adapter, tiny_qwen2vl

TARGETS = r".*language_model.*(q_proj|down_proj)"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plans") / "base"
    tiny_qwen2vl().to(torch.bfloat16).save_pretrained(folder, max_shard_size="300KB")
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    configs: dict[str, dict[str, Any]] = {
        "plain": {"r": 4, "target_modules": TARGETS},
        "rank": {"r": 2, "use_rslora": True, "target_modules": TARGETS},
        "merger": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["merger"]},
        "dora": {"r": 2, "use_dora": True, "target_modules": ["q_proj"]},
    }
    return {
        name: save_adapter(tiny_qwen2vl, LoraConfig(lora_alpha=4, **config), root / name, seed=number)
        for number, (name, config) in enumerate(configs.items())
    }


def planned(base: Path, folders: dict[str, Path], part_bytes: int = 1 << 30, **recipe: Any) -> Plan:
    located = [
        Located(adapter=name, version=fingerprint(folder), location=str(folder), folder=folder)
        for name, folder in folders.items()
    ]
    inputs = [{"adapter": name} for name in folders]
    asked = JobRecipe.model_validate({"name": "made", "method": "linear", "inputs": inputs, **recipe})
    found = opened(base, located, max_materialised_bytes=1 << 30)
    return plan_of(asked, located, found, base_name="tiny", part_bytes=part_bytes)


def only(adapters: dict[str, Path], *names: str) -> dict[str, Path]:
    return {name: adapters[name] for name in names}


def changed(folder: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of an adapter with another configuration."""
    shutil.copytree(folder, to)
    config = json.loads((to / "adapter_config.json").read_text())
    change(config)
    (to / "adapter_config.json").write_text(json.dumps(config))
    return to


def test_a_plan_says_what_is_to_be_done(base: Path, adapters: dict[str, Path]):
    plan = planned(base, only(adapters, "plain", "rank"), product="checkpoint")
    shards = sorted(base.glob("*.safetensors"))
    assert [unit.file for unit in plan.units] == [shard.name for shard in shards]
    assert plan.output_bytes == sum(shard.stat().st_size for shard in shards)
    assert [(found.adapter, found.max_rank, found.method) for found in plan.inputs] == [
        ("plain", 4, "LORA"), ("rank", 2, "LORA"),
    ]  # fmt: skip
    touched = {leaf for unit in plan.units for leaf in unit.leaves}
    assert touched and all("language_model" in leaf for leaf in touched)
    assert Plan.model_validate(json.loads(plan.model_dump_json())) == plan


def test_an_id_is_what_the_bytes_depend_on(base: Path, adapters: dict[str, Path]):
    two = only(adapters, "plain", "rank")
    first = planned(base, two)
    assert planned(base, dict(reversed(two.items()))).id == first.id
    assert planned(base, two, name="other", activate=False, verify={"probes": False}).id == first.id
    for other in (
        planned(base, two, product="checkpoint"),
        planned(base, two, dtype="bfloat16"),
        planned(base, two, method="ties"),
        planned(base, only(adapters, "plain")),
    ):
        assert other.id != first.id


def test_large_adapters_are_made_in_parts(base: Path, adapters: dict[str, Path]):
    whole, parts = (planned(base, only(adapters, "plain", "merger"), part_bytes=size) for size in (1 << 30, 20_000))
    assert len(whole.units) == 1 < len(parts.units)
    leaves = [leaf for unit in parts.units for leaf in unit.leaves]
    assert sorted(leaves) == list(whole.units[0].leaves) and len(set(leaves)) == len(leaves)


def test_what_is_odd_is_warned_of(base: Path, adapters: dict[str, Path]):
    assert "'dora' is DORA" in planned(base, only(adapters, "dora", "plain")).warnings[0]
    assert "truncated" in planned(base, only(adapters, "plain", "rank"), method="svd").warnings[0]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda a, t: {"x": changed(a["plain"], t, lambda c: c.update(r=3))}, "'x': .*shape"),
        (lambda a, t: {"x": changed(a["plain"], t, lambda c: c.update(target_modules=["q_prj"]))}, "q_prj"),
        (
            lambda a, t: {"x": changed(a["plain"], t, lambda c: c.update(base_model_name_or_path="other/base")), **a},
            "different bases: .*other/base",
        ),
        (lambda a, t: {"x": shutil.copytree(a["plain"], t), "y": a["plain"]}, "one content under two names"),
    ],
)
def test_bad_adapters_are_refused(base: Path, adapters: dict[str, Path], tmp_path: Path, make, said: str):
    plain = changed(adapters["plain"], tmp_path / "p", lambda c: c.update(base_model_name_or_path="tiny"))
    with pytest.raises(MergeRefused, match=said):
        planned(base, make({"plain": plain}, tmp_path / "x"))


def test_a_base_under_two_names_is_merged_when_asked(base: Path, adapters: dict[str, Path], tmp_path: Path):
    two = {
        name: changed(adapters[name], tmp_path / name, lambda c, n=name: c.update(base_model_name_or_path=f"org/{n}"))
        for name in ("plain", "rank")
    }
    with pytest.raises(MergeRefused, match="allow_other_bases"):
        planned(base, two)
    assert planned(base, two, allow_other_bases=True).inputs[0].base_name == "org/plain"


def test_files_that_changed_since_they_were_named_are_refused(base: Path, adapters: dict[str, Path]):
    folder = adapters["plain"]
    located = [Located(adapter="plain", version="0" * 64, location=str(folder), folder=folder)]
    with pytest.raises(MergeRefused, match="other content than when it was registered"):
        opened(base, located, max_materialised_bytes=1)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
        (lambda f: next(f.glob("*.safetensors")).unlink(), "lacks model-0"),
        (lambda f: next(f.glob("*.safetensors")).write_bytes(b"x" * 100), "damaged"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}'), "no file beside"),
        (
            lambda f: (f / "config.json").write_text(
                json.dumps({**json.loads((f / "config.json").read_text()), "quantization_config": {"bits": 4}})
            ),
            "The base is quantised",
        ),
    ],
)
def test_bad_bases_are_refused(base: Path, adapters: dict[str, Path], tmp_path: Path, harm, said: str):
    copy = shutil.copytree(base, tmp_path / "base")
    harm(copy)
    with pytest.raises(MergeRefused, match=said):
        planned(copy, only(adapters, "plain"), product="checkpoint")


def test_all_problems_are_told_at_once(base: Path, adapters: dict[str, Path], tmp_path: Path):
    wrong = {
        name: changed(adapters["plain"], tmp_path / name, lambda c: c.update(target_modules=["q_prj"])) for name in "ab"
    }
    with pytest.raises(MergeRefused) as caught:
        planned(base, wrong)
    assert len(caught.value.facts["problems"]) == 2
    assert "(1) 'a'" in caught.value.message and "(2) 'b'" in caught.value.message


def weighted(*weights: Any) -> list[dict[str, Any]]:
    return [{"adapter": name, "weight": weight} for name, weight in zip(("plain", "rank"), weights, strict=False)]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("*.self_atn.*", r"no module of the base matches '\*\.self_atn\.\*'\. Nearest: '\*\.self_attn\.\*'"),
        ("model.languge_model.*", r"Nearest: 'model\.language_model\.\*'"),
        ("*.layers.7.*", "no module of the base matches"),
        ("*.mlp.q_proj", r"Nearest: \*\.mlp\.up_proj"),
        ("zzz", "no module of the base matches 'zzz'"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(base: Path, adapters: dict[str, Path], pattern: str, said: str):
    inputs = weighted([{"modules": "*.mlp.*", "weight": 0.5}, {"modules": pattern, "weight": 0.1}], 1.0)
    with pytest.raises(MergeRefused, match=said):
        planned(base, only(adapters, "plain", "rank"), inputs=inputs)


def test_a_pattern_that_its_adapter_has_no_use_for_is_told(base: Path, adapters: dict[str, Path]):
    first = [{"modules": "*.q_proj", "weight": 0.5}, {"modules": "*.self_attn.*", "weight": 0.1}]
    other = [{"modules": "*.k_proj", "weight": 2}]
    plan = planned(base, only(adapters, "plain", "rank"), inputs=weighted(first, other))
    assert "'plain' changes no module that *.self_attn.* decides about." in plan.warnings
    assert "'rank' changes no module that *.k_proj decides about." in plan.warnings


ENTRIES = ("magnitude_prune", "ties", "dare_linear", "dare_ties", "della", "breadcrumbs", "robust_merge")
EFFECTS: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "density": (0.5, 0.3, ENTRIES),
    "space": ("core", "full", ENTRIES),
    "epsilon": (0.2, 0.1, ("della",)),
    "gamma": (0.01, 0.2, ("breadcrumbs",)),
    "convention": ("loom", "mergekit", ("ties", "dare_linear", "dare_ties", "della")),
    "seed": (0, 1, ("dare_linear", "dare_ties", "della")),
}
TWO = [{"adapter": "a"}, {"adapter": "b"}]


@pytest.mark.parametrize("option", EFFECTS)
@pytest.mark.parametrize("method", get_args(Method))
def test_an_option_without_effect_is_refused_where_it_is_set(option: str, method: str):
    """Also where it is set to its default; and those that have it are named."""
    default, other, methods = EFFECTS[option]
    for value in (default, other):
        said = {"name": "made", "method": method, "inputs": TWO, option: value}
        if method in methods:
            assert getattr(JobRecipe.model_validate(said), option) == value
        else:
            with pytest.raises(ValidationError, match=rf"'{option}' .*{', '.join(methods)}|leave '{option}' out"):
                JobRecipe.model_validate(said)


@pytest.mark.parametrize("method", get_args(Method))
def test_a_recipe_that_was_dumped_can_be_read_again(method: str):
    """From a manifest, from a kept plan, and from the plan of a release that dumped every option."""
    recipe = JobRecipe.model_validate({"name": "made", "method": method, "inputs": TWO})
    assert JobRecipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert recipe.arithmetic == Recipe.model_validate({"method": method, "inputs": TWO})


def test_plans_of_an_earlier_release_are_read(base: Path, adapters: dict[str, Path]):
    plan = planned(base, only(adapters, "plain", "rank"))
    kept = json.loads(plan.model_dump_json())
    assert "density" not in kept["recipe"]
    kept["recipe"] |= {"density": 0.5, "epsilon": 0.2, "gamma": 0.01, "convention": "loom", "space": "core", "seed": 0}
    assert Plan.model_validate(kept) == plan
    kept["recipe"]["density"] = 0.4
    with pytest.raises(ValidationError, match="no effect on 'linear'"):
        Plan.model_validate(kept)


@pytest.mark.parametrize("method", ["ties", "della"])
def test_negative_weights_as_mergekit_divides_them_are_refused(method: str):
    inputs = [{"adapter": "a", "weight": 0.5}, {"adapter": "b", "weight": [0.3, -0.499]}]
    said = {"name": "made", "method": method, "inputs": inputs, "epsilon": 0.2, "convention": "mergekit"}
    if method != "della":
        del said["epsilon"]
    with pytest.raises(ValidationError, match=r"signed sum of weights.*'b' has one\. The convention 'loom'"):
        JobRecipe.model_validate(said)
    JobRecipe.model_validate({**said, "convention": "loom"})
    JobRecipe.model_validate({"name": "made", "method": "dare_ties", "inputs": inputs, "convention": "mergekit"})
    with pytest.raises(ValidationError, match="PEFT has no 'della'"):
        JobRecipe.model_validate({"name": "made", "method": "della", "inputs": TWO, "convention": "peft"})


NOWHERE = [{"modules": "*.q_proj", "weight": 0}, {"modules": "*.down_proj", "weight": 0.0}]


@pytest.mark.parametrize("weights", [(0.0, 0), (NOWHERE, [0.0, 0.0]), ([{"modules": "*", "weight": 0}], 0.0)])
def test_weights_that_are_0_wherever_anything_changes_are_refused(
    base: Path, adapters: dict[str, Path], weights: tuple[Any, Any]
):
    with pytest.raises(MergeRefused, match="Every weight is 0 where its adapter changes anything"):
        planned(base, only(adapters, "plain", "rank"), inputs=weighted(*weights))


@pytest.mark.parametrize("product", ["adapter", "checkpoint"])
def test_weight_0_for_some_modules_is_a_recipe(base: Path, adapters: dict[str, Path], product: str):
    without = [{"modules": "*.down_proj", "weight": 0}]
    plan = planned(base, only(adapters, "plain", "rank"), inputs=weighted(without, without), product=product)
    if product == "checkpoint":
        changed_leaves = {leaf for unit in plan.units for leaf in unit.leaves}
        assert changed_leaves and all(leaf.endswith("q_proj") for leaf in changed_leaves)


@pytest.fixture(scope="module")
def relatives(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``plain`` again: turned round, twice as large, and almost itself, each factored otherwise."""
    root = tmp_path_factory.mktemp("relatives")
    found = {}
    for name, factor, noise in (("opposite", -1.0, 0.0), ("twice", 2.0, 0.0), ("near", 1.0, 1e-3)):
        folder = shutil.copytree(adapters["plain"], root / name)
        tensors = load_file(folder / "adapter_model.safetensors")
        generator = torch.Generator().manual_seed(3)
        for key, tensor in tensors.items():
            if "lora_A" in key:
                turn = torch.linalg.qr(torch.randn(len(tensor), len(tensor), generator=generator)).Q
                other = key.replace("lora_A", "lora_B")
                tensors[key], tensors[other] = turn.T @ tensor, factor * tensors[other] @ turn
        for key, tensor in tensors.items():
            tensors[key] = tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=generator)
        save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "adapter_model.safetensors")
        found[name] = folder
    return found


ALL = ("cat", "linear", "svd", "magnitude_prune", "ties", "breadcrumbs", "tsv", "core_tsv", "iso_c", "robust_merge")


@pytest.mark.parametrize("method", ALL)
def test_deltas_that_cancel_everywhere_are_refused(
    base: Path, adapters: dict[str, Path], relatives: dict[str, Path], method: str
):
    for other, weight in (("opposite", 1.0), ("twice", -0.5)):
        folders = {"plain": adapters["plain"], other: relatives[other]}
        inputs = [{"adapter": "plain"}, {"adapter": other, "weight": weight}]
        with pytest.raises(MergeRefused, match=r"deltas cancel in all \d+ modules \(what is left is at most \d"):
            planned(base, folders, method=method, inputs=inputs)


def test_deltas_that_cancel_in_part_or_nearly_are_told_with_numbers(
    base: Path, adapters: dict[str, Path], relatives: dict[str, Path]
):
    folders = {"plain": adapters["plain"], "opposite": relatives["opposite"]}
    some = [{"adapter": "plain"}, {"adapter": "opposite", "weight": [{"modules": "*.down_proj", "weight": 0.5}]}]
    told = " ".join(planned(base, folders, inputs=some).warnings)
    assert "cancel in 2 of 4 modules, most of all in model.language_model.layers." in told and "q_proj" in told
    assert "'plain' is 'opposite' times -1" in told or "'opposite' is 'plain' times -1" in told
    assert "in 4 of 4 modules: they are one change, counted twice" in told
    random = planned(base, folders, method="dare_ties").warnings
    assert any("cancel in 4 of 4" in warning for warning in random), "what is dropped at random does not cancel"
    assert not planned(base, only(adapters, "plain", "rank"), inputs=weighted(1.0, -1.0)).warnings


@pytest.mark.parametrize("method", ["slerp", "karcher"])
def test_opposite_deltas_have_no_mean(
    base: Path, adapters: dict[str, Path], relatives: dict[str, Path], method: str
):
    folders = {"plain": adapters["plain"], "opposite": relatives["opposite"]}
    with pytest.raises(MergeRefused, match=rf"In 4 of 4 modules the deltas are opposite .* '{method}' has no mean"):
        planned(base, folders, method=method)
    plan = planned(base, {"plain": adapters["plain"], "twice": relatives["twice"]}, method=method)
    assert "times 2 in 4 of 4" in plan.warnings[0] or "times 0.5 in 4 of 4" in plan.warnings[0]


@pytest.mark.parametrize("method", ["tsv", "core_tsv"])
def test_directions_that_depend_on_each_other_are_told(
    base: Path, adapters: dict[str, Path], relatives: dict[str, Path], method: str
):
    for other, said in (("twice", "averaged in 4 modules, .* blown up in 0"), ("near", "in 0 modules, .* in 4")):
        folders = {"plain": adapters["plain"], other: relatives[other]}
        told = " ".join(planned(base, folders, method=method).warnings)
        assert re.search(rf"in 4 of 4 modules they are hardly independent .*{said}", told), told
    assert not planned(base, only(adapters, "plain", "rank"), method=method).warnings


def test_lora_bias_where_the_base_has_no_bias_is_told(base: Path, adapters: dict[str, Path], tmp_path: Path):
    config = LoraConfig(r=2, lora_bias=True, target_modules=r".*language_model.*q_proj")
    folders = {"plain": adapters["plain"], "biased": save_adapter(tiny_qwen2vl, config, tmp_path / "biased", seed=8)}
    (told,) = planned(base, folders).warnings
    assert "lora_bias" in told and "2 modules" in told and "layers.0.mlp.down_proj" in told
    assert "merge_and_unload refuses" in told
    assert not planned(base, folders, product="checkpoint").warnings
    assert not planned(base, {"biased": folders["biased"]}).warnings, "q_proj has a bias"


def test_what_is_told_of_lora_bias_is_so(base: Path, adapters: dict[str, Path], tmp_path: Path):
    """PEFT runs the merged adapter and refuses to merge it; without bias-free modules it merges it, to the same."""
    model = Qwen2VLForConditionalGeneration.from_pretrained
    config = LoraConfig(r=2, lora_bias=True, target_modules=r".*language_model.*q_proj")
    biased = save_adapter(tiny_qwen2vl, config, tmp_path / "biased", seed=8)
    layout = BaseLayout.from_config(base)
    for others, merges in (({"plain": adapters["plain"]}, False), ({}, True)):
        weights = {name: read_adapter(folder, layout) for name, folder in {"biased": biased, **others}.items()}
        recipe = Recipe.model_validate({"method": "linear", "inputs": [{"adapter": name} for name in weights]})
        write_adapter(
            merge(recipe, weights, lambda *_: torch.zeros(())).weights, tmp_path / f"{merges}", layout, base_name="tiny"
        )
        adapted = PeftModel.from_pretrained(model(base, dtype=torch.float32), str(tmp_path / f"{merges}")).eval()
        ran = logits_of(adapted, sample_inputs())
        if not merges:
            with pytest.raises(RuntimeError, match="base layer has no bias"):
                adapted.merge_and_unload()
            continue
        assert float((logits_of(adapted.merge_and_unload(), sample_inputs()) - ran).abs().max()) < 1e-4
