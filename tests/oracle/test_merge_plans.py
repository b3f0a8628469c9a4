"""Plans: what they say of a merge before it is done, and everything that is refused there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from lora_runtime.checkpoint import fingerprint
from lora_runtime.errors import MergeRefused
from lora_runtime.merge.job import JobRecipe, Plan
from lora_runtime.merge.planning import Located, opened, plan_of
from tests.oracle.models import save_adapter, tiny_qwen2vl

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
