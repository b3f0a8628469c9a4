"""Several adapters added into a base's shards leaf by leaf, and adapters made in parts: both are the dense sum."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from lora_runtime.checkpoint import OpenedAdapter, fingerprint
from lora_runtime.errors import MergeRefused
from lora_runtime.materialise import Materialiser
from lora_runtime.merge.adapters import Merged
from lora_runtime.merge.base import BaseCheckpoint
from lora_runtime.merge.inputs import Inputs
from lora_runtime.merge.job import JobRecipe
from lora_runtime.merge.parts import read_parts, write_part
from lora_runtime.merge.planning import Located, opened, plan_of
from lora_runtime.merge.recipe import Recipe
from lora_runtime.merge.shard import merge_shard
from lora_runtime.parameters import BaseParameters
from tests.oracle.methods import METHODS
from tests.oracle.models import apply_dense, logits_of, save_adapter, tiny_qwen2vl
from tests.oracle.test_checkpoint import BASES, INPUTS, MOVED, TOLERANCE, Saved, differ, saved  # noqa: F401

FULL = {
    **{"patterns": 0.7, "tower and convolution": -0.4, "saved merger": 0.5, "vocabulary": 0.3, "saved tower": 0.25},
    **{"saved norms by bare suffix": 0.25, "own biases": 1.5, "tokens by module": 0.9, "saved vocabulary": -0.5},
}
OTHERS = {"dora": 0.6, "loha": -0.5, "ia3": 0.8}


def sharded(root: Path, *, tie: bool) -> Path:
    BASES[tie]().save_pretrained(root / "base", max_shard_size="300KB")
    return root / "base"


def open_all(base: Path, saved: Saved, tie: bool, folders: dict[str, Path]) -> dict[str, OpenedAdapter]:  # noqa: F811
    own = Materialiser(BaseParameters(base), 1 << 30)
    return {name: OpenedAdapter(folder, saved.layouts[tie], own) for name, folder in folders.items()}


def recipe(shares: dict[str, Any], method: str = "linear", **more: Any) -> Recipe:
    inputs = [{"adapter": name, "weight": weight} for name, weight in shares.items()]
    return Recipe.model_validate({"method": method, "inputs": inputs, **more})


def merged_model(base: Path, out: Path, inputs: Inputs) -> Any:
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors"))
    checkpoint = BaseCheckpoint(base)
    for shard in checkpoint.shards:
        merge_shard(base / shard.file, out / shard.file, inputs, shard.places)
    return Qwen2VLForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", ["LoRA and all that is saved", "other methods"])
def test_what_is_added_into_shards_is_the_dense_sum(saved: Saved, tmp_path: Path, kind: str):  # noqa: F811
    base = sharded(tmp_path, tie=False)
    if kind == "other methods":
        shares = OTHERS
        folders = {name: save_adapter(tiny_qwen2vl, METHODS[name], tmp_path / name) for name in shares}
    else:
        shares = FULL
        folders = {name: saved.path(False, name) for name in shares}
    adapters = open_all(base, saved, False, folders)
    want = tiny_qwen2vl()
    for name, share in shares.items():
        apply_dense_delta(want, adapters[name], share)
    expected = logits_of(want, INPUTS)
    assert differ(expected, saved.base_logits[False]) > MOVED
    inputs = Inputs(recipe(shares), adapters, BaseParameters(base), saved.layouts[False])
    got = logits_of(merged_model(base, tmp_path / "out", inputs), INPUTS)
    assert differ(got, expected) < 10 * TOLERANCE


def apply_dense_delta(model: torch.nn.Module, adapter: OpenedAdapter, share: float) -> None:
    """share·Δ of one adapter, where others were added before: Δ is of the base, not of ``model``."""
    alone = apply_dense(tiny_qwen2vl(), adapter.weights())
    base = dict(tiny_qwen2vl().named_parameters())
    with torch.no_grad():
        for name, parameter in alone.named_parameters():
            model.get_parameter(name).add_(share * (parameter - base[name]))


@pytest.mark.parametrize("name", ["embedding, tying", "saved embedding, tying", "saved head, tying", "tokens", "list"])
def test_ties_that_are_kept_are_merged(saved: Saved, tmp_path: Path, name: str):  # noqa: F811
    base = sharded(tmp_path, tie=True)
    adapters = open_all(base, saved, True, {name: saved.path(True, name)})
    inputs = Inputs(recipe({name: 1.0}), adapters, BaseParameters(base), saved.layouts[True])
    assert inputs.torn == [] and ("lm_head", "weight") not in inputs.places
    got = logits_of(merged_model(base, tmp_path / "out", inputs), INPUTS)
    assert differ(got, saved.logits(True, name)) < 5 * TOLERANCE


@pytest.mark.parametrize("name", ["embedding", "head", "saved embedding", "saved head", "other tokens of each"])
def test_ties_that_would_be_torn_are_refused(saved: Saved, tmp_path: Path, name: str):  # noqa: F811
    base, folder = sharded(tmp_path, tie=True), saved.path(True, name)
    located = [Located(adapter="x", version=fingerprint(folder), location=str(folder), folder=folder)]
    found = opened(base, located, max_materialised_bytes=1 << 30)
    said: dict[str, Any] = {"name": "made", "method": "linear", "inputs": [{"adapter": "x"}]}
    with pytest.raises(MergeRefused, match=r"ties 'lm_head' to .*untie the base"):
        plan_of(JobRecipe.model_validate({**said, "product": "checkpoint"}), located, found, base_name="tiny")
    plan_of(JobRecipe.model_validate(said), located, found, base_name="tiny")


@pytest.mark.parametrize("method", ["cat", "svd", "ties", "dare_linear"])
def test_an_adapter_made_in_parts_is_the_one_made_at_once(saved: Saved, tmp_path: Path, method: str):  # noqa: F811
    """Byte for byte, with weights that are spread over the layers, though no part has all layers."""
    base = sharded(tmp_path, tie=False)
    shares = {"patterns": [0.2, 0.9], "all linear": [1.0, -0.5], "saved merger": 0.5, "tokens": 0.7}
    adapters = open_all(base, saved, False, {name: saved.path(False, name) for name in shares})
    build = partial(Inputs, recipe(shares, method), adapters, BaseParameters(base), saved.layouts[False])
    whole = build().merged()
    leaves = sorted({leaf for adapter in adapters.values() for leaf in adapter.modules})
    files = []
    for number, first in enumerate(range(0, len(leaves), 5)):
        files.append(tmp_path / f"part-{number}.safetensors")
        write_part(build().merged(leaves[first : first + 5], with_heads=number == 0), files[-1])
    assert len(files) > 3
    assert_same(read_parts(files), whole)


def assert_same(one: Merged, other: Merged) -> None:
    got, want = one.weights, other.weights
    assert got.version == want.version and got.modules == want.modules and one.leaves == other.leaves
    for leaf, factors in want.lora.items():
        mine = got.lora[leaf]
        assert torch.equal(mine.a, factors.a) and torch.equal(mine.b, factors.b) and mine.kind == factors.kind
    for leaf, module in want.saved.items():
        for parameter, tensor in module.parameters.items():
            assert torch.equal(got.saved[leaf].parameters[parameter], tensor)
    for leaf, rows in want.token_rows.items():
        assert torch.equal(got.token_rows[leaf].rows, rows.rows)
        assert torch.equal(got.token_rows[leaf].indices, rows.indices)
