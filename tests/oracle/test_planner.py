"""Plans as the service makes them: what else is refused before anything is written, on the demo's own base."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_runtime.checkpoint import fingerprint
from lora_runtime.errors import MergeRefused, VersionDamaged
from lora_runtime.merge.job import JobRecipe
from lora_runtime.zoo.paths import ADAPTERS
from serve.config import Settings
from serve.intake import Named
from serve.loading import load_settings
from serve.planner import planned


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings({"state_dir": str(tmp_path / "state"), "engine": {"kind": "embedded"}})


def named(*adapters: str, version: str | None = None) -> list[Named]:
    return [
        Named(adapter=name, version=version or fingerprint(ADAPTERS[name]), location=str(ADAPTERS[name]))
        for name in adapters
    ]


def recipe(**change: Any) -> JobRecipe:
    said = {"name": "made", "product": "checkpoint", "method": "linear", "inputs": [{"adapter": "shape"}], **change}
    return JobRecipe.model_validate(said)


def test_a_disk_that_is_too_small_is_told_beforehand(settings: Settings, monkeypatch: pytest.MonkeyPatch):
    assert planned(recipe(), named("shape"), settings).output_bytes > 2_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(MergeRefused, match=r"needs 0\.02 GB of disk where it is made; 0\.00 GB are free"):
        planned(recipe(), named("shape"), settings)
    assert not Path(settings.merges_url).exists()


def test_a_result_that_exists_is_not_written_over(settings: Settings, tmp_path: Path):
    (Path(settings.merges_url) / "made").mkdir(parents=True)
    with pytest.raises(MergeRefused, match="'made' exists already"):
        planned(recipe(), named("shape"), settings)
    (tmp_path / "out").mkdir()
    with pytest.raises(MergeRefused, match="'out' exists already"):
        planned(recipe(product="adapter"), named("shape"), settings, target=str(tmp_path / "out"))
    planned(recipe(product="adapter"), named("shape"), settings)


def test_an_engine_without_a_base_has_nothing_to_merge_into():
    fake = load_settings({"engine": {"kind": "fake"}})
    with pytest.raises(MergeRefused, match="no base to merge into"):
        planned(recipe(), named("shape"), fake)


def test_files_that_are_gone_and_examples_that_are_wrong_are_told_together(settings: Settings, tmp_path: Path):
    (tmp_path / "examples.jsonl").write_text(json.dumps({"prompt": "All shapes?"}) + "\n")
    missing = Named(adapter="shape", version="0" * 64, location="memory://nowhere/0")
    search = {"examples": str(tmp_path / "examples.jsonl")}
    with pytest.raises(MergeRefused) as caught:
        planned(recipe(search=search), [missing], settings)
    gone, wrong = caught.value.facts["problems"]
    assert "'shape'" in gone and "search.examples" in wrong and "answer" in wrong


@pytest.mark.parametrize("harm", ["gone", "cut", "changed", "bucket"])
def test_what_the_store_damaged_is_not_the_recipes_fault(settings: Settings, tmp_path: Path, harm: str):
    shutil.copytree(ADAPTERS["shape"], tmp_path / "shape")
    (one,) = named("shape")
    tensors = tmp_path / "shape" / "adapter_model.safetensors"
    if harm == "gone":
        tensors.unlink()
    elif harm == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    elif harm == "changed":
        tensors.write_bytes((ADAPTERS["size"] / "adapter_model.safetensors").read_bytes())
    location = "memory://nowhere/0" if harm == "bucket" else str(tmp_path / "shape")
    with pytest.raises(VersionDamaged, match=f"shape@{one.version[:12]}"):
        planned(recipe(), [replace(one, location=location)], settings)
    assert planned(recipe(), named("shape"), settings)


def test_weights_of_a_search_start_the_recipe_anew():
    searching = recipe(inputs=[{"adapter": "shape"}, {"adapter": "french"}], search={"examples": "x"})
    found = searching.weighing({"shape": 0.25, "french": -0.5})
    assert [said.weight for said in found.inputs] == [0.25, -0.5] and found.search is None
    assert found.arithmetic.version({"shape": "a", "french": "b"}) != searching.arithmetic.version(
        {"shape": "a", "french": "b"}
    )
