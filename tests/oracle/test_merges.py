"""Merges of adapters that PEFT saved: exact ones against dense sums, all of them through a save and PEFT's reload, and
the truncated one against PEFT's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from lora_runtime.checkpoint import read_adapter
from lora_runtime.export import write_adapter
from lora_runtime.merge.adapters import Merged, merge
from lora_runtime.merge.recipe import Recipe
from lora_runtime.merge.rules import RULES
from tests.oracle.models import dense_logits, logits_of, peft_logits, save_adapter, tiny_qwen2vl
from tests.oracle.test_checkpoint import BASES, INPUTS, MOVED, TOLERANCE, Saved, dense_sum, differ, saved  # noqa: F401

MIXED = {"rslora": 0.7, "patterns": -0.4, "all linear": 0.5}
FULL = {"saved merger": 0.5, "saved norms by bare suffix": 0.25, "patterns": 1.0}


def merged(saved: Saved, method: str, shares: dict[str, float], **more: object) -> Merged:  # noqa: F811
    inputs = [{"adapter": name, "weight": weight} for name, weight in shares.items()]
    recipe = Recipe.model_validate({"method": method, "inputs": inputs, **more})
    base = BASES[False]()
    adapters = {name: saved.weights(False, name) for name in shares}
    return merge(recipe, adapters, lambda leaf, parameter: base.get_submodule(leaf).get_parameter(parameter).detach())


@pytest.mark.parametrize("method", ["cat", "linear"])
@pytest.mark.parametrize("shares", [MIXED, FULL], ids=["low rank", "saved modules"])
def test_exact_methods_are_the_sum_of_deltas(saved: Saved, method: str, shares: dict[str, float]):  # noqa: F811
    want = logits_of(dense_sum(saved, False, shares), INPUTS)
    assert differ(want, saved.base_logits[False]) > MOVED
    got = dense_logits(BASES[False], merged(saved, method, shares).weights, INPUTS)
    assert differ(got, want) < 5 * TOLERANCE


@pytest.mark.parametrize("method", sorted({*RULES, "cat", "svd"} - {"karcher"}))
def test_what_is_merged_peft_loads_to_the_same_function(saved: Saved, tmp_path: Path, method: str):  # noqa: F811
    """Ranks that differ by module, scalings of either kind: nothing of it is left to the config's arithmetic."""
    found = merged(saved, method, MIXED, **({"rank": 3} if method == "svd" else {}))
    write_adapter(found.weights, tmp_path / "merged", saved.layouts[False], base_name="tiny")
    want = dense_logits(BASES[False], found.weights, INPUTS)
    assert differ(want, saved.base_logits[False]) > MOVED
    assert differ(peft_logits(BASES[False], tmp_path / "merged", INPUTS), want) < 5 * TOLERANCE


def peft_svd(paths: list[Path], weights: list[float], rank: int) -> dict[str, Tensor]:
    """Deltas by leaf that PEFT's own svd merge makes."""
    model = PeftModel.from_pretrained(tiny_qwen2vl(), paths[0], adapter_name="0")
    for number, path in enumerate(paths[1:], 1):
        model.load_adapter(path, adapter_name=str(number))
    names = [str(number) for number in range(len(paths))]
    model.add_weighted_adapter(names, weights, "merged", combination_type="svd", svd_rank=rank)
    found = {}
    for name, module in model.named_modules():
        if "merged" in getattr(module, "lora_A", {}):
            leaf = name.removeprefix("base_model.model.")
            found[leaf] = module.get_delta_weight("merged").detach()
    return found


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_truncation_is_pefts(saved: Saved, tmp_path: Path, rank: int):  # noqa: F811
    """Plain LoRA of one rank is what PEFT's svd merge gets right: there the two are one, at a fraction of the work."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    paths = [save_adapter(tiny_qwen2vl, config, tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    want = peft_svd(paths, [0.6, 0.8], rank)
    adapters = {path.name: read_adapter(path, saved.layouts[False]) for path in paths}
    inputs = [{"adapter": "1", "weight": 0.6}, {"adapter": "2", "weight": 0.8}]
    recipe = Recipe.model_validate({"method": "svd", "inputs": inputs, "rank": rank})
    got = merge(recipe, adapters, lambda *_: torch.zeros(()))
    assert set(want) == set(got.weights.lora)
    for leaf, delta in want.items():
        assert float((got.weights.lora[leaf].delta() - delta).norm() / delta.norm()) < 1e-4
        assert got.weights.lora[leaf].rank == rank
