"""What PEFT makes of a base in bf16 is rounded once, at the end: merged, and served by the embedded engine.

The oracle is PEFT's own merge in fp32, summed in fp64. Changes are small beside the weights (``small_changes.py``), so
that a weight rounded to bf16 on the way loses up to all of them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from lora_runtime.checkpoint import fingerprint, read_adapter
from lora_runtime.engine.embedded.config import EmbeddedConfig
from lora_runtime.engine.embedded.engine import EmbeddedEngine
from lora_runtime.errors import VerificationFailed
from lora_runtime.export import write_adapter
from lora_runtime.layout import BaseLayout
from lora_runtime.merge.job import JobRecipe
from lora_runtime.merge.planning import Located, Opened, opened
from lora_runtime.merge.shard import ShardReport, merge_shard
from lora_runtime.merge.verify import check_adapter
from lora_runtime.methods import BY_TYPE
from lora_runtime.names import place_of
from lora_runtime.parameters import BaseParameters
from tests.oracle.methods import METHODS
from tests.oracle.models import save_adapter, tiny_qwen2vl
from tests.oracle.small_changes import (
    CONFIGS,
    KEPT,
    Parameters,
    Shares,
    build_small_world,
    check_served,
    own_parameters,
    peft_merged,
    summed,
)
from tests.oracle.world import World

EPS = torch.finfo(torch.float32).eps
NUM_ROUNDINGS = 2.0
"""‖got - want‖/‖W‖ in units of fp32's rounding, times Σ|w|: a sum and what PEFT itself rounds."""
SUMS: tuple[dict[str, float], ...] = (
    {"dora": 8.0},
    {"loha": -1.0},
    {"dora": 0.5, "loha": 0.5},
    {"dora": 0.5, "plain": 0.5, "ia3": -0.75},
    {"saved": 0.5, "biases": 0.5},
    {"tokens": 0.5, "dora on the vocabulary": 0.5},
)
TARGETS: tuple[Shares, ...] = (*({name: 1.0} for name in CONFIGS), *SUMS)


def said(shares: Shares) -> str:
    return " ".join(f"{weight:+g} {name}" for name, weight in shares.items())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_small_world(tmp_path_factory.mktemp("small"))


def prepared_job(small: World, shares: Shares, **options: object) -> tuple[JobRecipe, Opened]:
    inputs = [{"adapter": name, "weight": weight} for name, weight in shares.items()]
    recipe = JobRecipe.model_validate({"name": "merged", "inputs": inputs, "method": "cat", **options})
    located = [
        Located(adapter=name, version=fingerprint(folder), location=str(folder), folder=folder)
        for name, folder in ((name, small.adapters[name]) for name in shares)
    ]
    return recipe, opened(small.base, located, max_materialised_bytes=1 << 30)


def check_kept(got: Parameters, want: Parameters, own: Parameters, shares: Shares) -> None:
    """``got`` is ``want`` up to fp32's rounding of the weights, parameter by parameter."""
    rounding = NUM_ROUNDINGS * EPS * sum(max(1.0, abs(weight)) for weight in shares.values())
    changed = {name for name in want if name not in own or not torch.equal(want[name], own[name])}
    assert changed
    for name in want:
        apart, size = float((got[name] - want[name]).norm()), float(want[name].norm())
        assert apart <= rounding * size, (name, apart / size)
        if name in changed and name in own:
            assert apart <= KEPT * float((want[name] - own[name]).norm()), name


def test_every_method_is_here(small: World) -> None:
    assert {config.peft_type.value for config in METHODS.values()} == {*BY_TYPE, "LORA"}


@pytest.mark.parametrize("name", METHODS)
def test_bf16_would_take_much_of_it(small: World, name: str) -> None:
    """Or the tests below would prove little: more than fp32 may by far."""
    own, merged = own_parameters(small), peft_merged(small, small.adapters[name])
    changed = [parameter for parameter in own if not torch.equal(merged[parameter], own[parameter])]
    lost = max(float((merged[p] - merged[p].bfloat16().double()).norm() / (merged[p] - own[p]).norm()) for p in changed)
    assert lost > (0.003 if name == "hra" else 0.05)


@pytest.mark.parametrize("shares", TARGETS, ids=said)
def test_a_merged_adapter_is_pefts_own_in_fp32(small: World, tmp_path: Path, shares: Shares) -> None:
    recipe, found = prepared_job(small, shares)
    weights = found.inputs(recipe).merged().weights
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in weights.tensors())
    write_adapter(weights, tmp_path / "merged", found.layout, base_name="small", dtype=torch.float32)
    got = peft_merged(small, tmp_path / "merged")
    want = summed(small, shares)
    check_kept(got, want, own_parameters(small), shares)
    if set(shares) <= set(METHODS) and shares == dict.fromkeys(shares, 1.0):
        assert all(torch.equal(got[parameter], want[parameter]) for parameter in want), "bit for bit"


@pytest.mark.parametrize("shares", TARGETS, ids=said)
def test_a_merged_checkpoint_is_rounded_once_and_says_how_much(small: World, tmp_path: Path, shares: Shares) -> None:
    recipe, found = prepared_job(small, shares, product="checkpoint")
    (shard,) = found.base.shards
    report = merge_shard(small.base / shard.file, tmp_path / shard.file, found.inputs(recipe), shard.places)
    want = {".".join(place_of(name)): tensor for name, tensor in load_file(tmp_path / shard.file).items()}
    check_reported(report, {k: v.double() for k, v in want.items()}, summed(small, shares), own_parameters(small))


def check_reported(report: ShardReport, got: Parameters, exact: Parameters, own: Parameters) -> None:
    for name, tensor in got.items():
        # Where fp32's last bits decide to which side, both are right.
        rounded = exact[name].bfloat16().double()
        assert float((tensor != rounded).double().mean()) < 2e-3, name
        assert float((tensor - exact[name]).norm()) <= 1.001 * float((rounded - exact[name]).norm()) + 1e-9, name
    for key, one in report.tensors.items():
        name = ".".join(place_of(key))
        change = float((exact[name] - own[name]).norm())
        lost = float((got[name] - exact[name]).norm())
        if change == 0.0:  # a bias that PEFT carries along
            assert one.rounding == 0.0 and one.delta_norm == 0.0, name
            continue
        assert one.delta_norm == pytest.approx(change, rel=1e-3), name
        assert one.rounding == pytest.approx(lost / change, rel=1e-3, abs=1e-4), name
        assert one.changed == pytest.approx(float((got[name] != own[name]).double().mean())), name


async def test_what_is_served_is_what_peft_answers_in_fp32(small: World) -> None:
    """All adapters and sums on four slots at once."""
    engine = EmbeddedEngine(EmbeddedConfig(base_path=str(small.base), device="cpu", max_batch_size=4, max_slots=4))
    await engine.start()
    await check_served(engine, small, TARGETS)
    await engine.close()


def test_trained_rows_stay_exact_in_a_saved_weight_of_a_narrower_dtype(tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices=[3, 70], modules_to_save=["embed_tokens"]
    )
    folder = save_adapter(tiny_qwen2vl, config, tmp_path / "made")
    tensors = load_file(folder / "adapter_model.safetensors")
    table = next(key for key in tensors if key.endswith("embed_tokens.token_adapter.base_layer.weight"))
    (rows,) = (tensor for key, tensor in tensors.items() if key.endswith("trainable_tokens_delta"))
    save_file(tensors | {table: tensors[table].bfloat16()}, folder / "adapter_model.safetensors")
    read = read_adapter(folder, BaseLayout.from_model(tiny_qwen2vl()))
    weight = read.saved["model.language_model.embed_tokens"].parameters["weight"]
    assert torch.equal(weight[[3, 70]], rows) and not torch.equal(rows, rows.bfloat16().float())
    assert torch.equal(weight[4:70], tensors[table][4:70].bfloat16().float())


@pytest.mark.parametrize("name", ["dora", "saved", "tokens"])
def test_an_adapter_stored_in_bf16_says_how_much_of_its_change_that_takes(
    small: World, tmp_path: Path, name: str
) -> None:
    recipe, found = prepared_job(small, {name: 1.0})
    weights, base = found.inputs(recipe).merged().weights, BaseParameters(small.base)
    write_adapter(weights, tmp_path / "exact", found.layout, base_name="small", dtype=torch.float32)
    assert check_adapter(tmp_path / "exact", found.layout, weights, base)[1] == []
    write_adapter(weights, tmp_path / "narrow", found.layout, base_name="small", dtype=torch.bfloat16)
    (said,) = check_adapter(tmp_path / "narrow", found.layout, weights, base)[1]
    own, merged, stored = own_parameters(small), summed(small, {name: 1.0}), peft_merged(small, tmp_path / "narrow")
    leaves = {*weights.saved, *weights.token_rows}
    lost = max(
        sum(float((stored[p] - merged[p]).square().sum()) for p in of_leaf) ** 0.5
        / sum(float((merged[p] - own[p]).square().sum()) for p in of_leaf) ** 0.5
        for of_leaf in ([p for p in own if p.rpartition(".")[0] == leaf] for leaf in leaves)
    )
    assert lost > 0.03 and f"up to {lost:.0%} of the change" in said


def test_an_adapter_stored_in_fp32_that_was_rounded_before_is_caught(small: World, tmp_path: Path) -> None:
    """A weight that went through fp16 is within 2e-4 of what was meant, and its change is not."""
    recipe, found = prepared_job(small, {"dora": 1.0})
    weights, base = found.inputs(recipe).merged().weights, BaseParameters(small.base)
    rounded = {leaf: m.in_dtype(torch.float16).in_dtype(torch.float32) for leaf, m in weights.saved.items()}
    write_adapter(replace(weights, saved=rounded), tmp_path / "rounded", found.layout, base_name="small")
    with pytest.raises(VerificationFailed, match=r"of what changes in '.*' \d+% is lost"):
        check_adapter(tmp_path / "rounded", found.layout, weights, base)
