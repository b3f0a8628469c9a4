"""A small DoRA, and a sum of it with LoHa, on a base in bf16, through ``loom merge``: rounded once, and verified."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from lora_runtime.names import place_of
from tests.oracle.jobs import made, settings_of
from tests.oracle.small_changes import Shares, build_small_world, peft_merged, summed
from tests.oracle.world import World


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_small_world(tmp_path_factory.mktemp("small"))


@pytest.mark.slow
@pytest.mark.parametrize("shares", [{"dora": 1.0}, {"dora": 0.5, "loha": -2.0}], ids=str)
@pytest.mark.parametrize("product", ["adapter", "checkpoint"])
def test_what_is_published_is_pefts_own(small: World, tmp_path: Path, shares: Shares, product: str) -> None:
    inputs = [{"adapter": str(small.adapters[name]), "weight": weight} for name, weight in shares.items()]
    recipe = {"inputs": inputs, "method": "cat", "product": product}
    job = made(settings_of(tmp_path / "state", small.base), recipe, tmp_path / "out")
    assert job.state == "succeeded", job
    want = summed(small, shares)
    if product == "adapter":
        got = peft_merged(small, tmp_path / "out")
        for name, tensor in want.items():
            assert float((got[name] - tensor).norm()) <= 1e-6 * float(tensor.norm()), name
        return
    for file in (tmp_path / "out").glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            # Where fp32's last bits decide to which side a value is rounded, both are right.
            other = tensor != want[".".join(place_of(key))].bfloat16()
            assert float(other.double().mean()) < 2e-3, key
