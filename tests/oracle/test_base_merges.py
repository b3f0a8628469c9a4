"""An adapter added into a sharded checkpoint, shard by shard: what transformers loads from it is the model with the
adapter, and every byte that the adapter does not touch is the base's."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLForConditionalGeneration

from lora_runtime.combine import combine
from lora_runtime.errors import CheckpointRejected, UnknownModules
from lora_runtime.merge import shard
from lora_runtime.merge.changes import AdapterChanges, check_all_land
from lora_runtime.merge.shard import ShardReport, merge_shard
from lora_runtime.names import canonical
from lora_runtime.parameters import BaseParameters
from lora_runtime.weights import AdapterWeights, LoraFactors, SavedModule
from tests.oracle.models import dense_logits, logits_of, tiny_qwen2vl
from tests.oracle.test_checkpoint import BASES, INPUTS, MOVED, TOLERANCE, Saved, differ, saved  # noqa: F401

SHARES = {
    **{"patterns": 0.7, "tower and convolution": -0.4, "saved merger": 0.5, "vocabulary": 0.3},
    **{"saved norms by bare suffix": 0.25, "own biases": 1.5, "tokens by module": 0.9},
}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_qwen2vl().to(request.param).save_pretrained(folder, max_shard_size="300KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def places_of(file: Path) -> dict[str, tuple[str, str]]:
    with safe_open(file, framework="pt") as opened:
        keys = list(opened.keys())
    return {key: (canonical(key.rpartition(".")[0]), key.rpartition(".")[2]) for key in keys}


def merged_into(base: Path, out: Path, weights: AdapterWeights, **more: int) -> dict[str, ShardReport]:
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors"))
    shards = sorted(base.glob("*.safetensors"))
    changes = AdapterChanges(weights)
    check_all_land(changes.places, [place for shard in shards for place in places_of(shard).values()])
    return {s.name: merge_shard(s, out / s.name, changes, places_of(s), **more) for s in shards}


def adapter(saved: Saved, base: Path) -> AdapterWeights:  # noqa: F811
    members = [(saved.weights(False, name), share) for name, share in SHARES.items()]
    return combine(members, BaseParameters(base))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  # not a mapping
    return found


def test_what_is_merged_is_the_base_with_the_adapter(saved: Saved, base: Path, tmp_path: Path):  # noqa: F811
    weights = adapter(saved, base)
    reports = merged_into(base, tmp_path / "out", weights, block_bytes=20_000)
    before, after = tensors(base), tensors(tmp_path / "out")
    places = {key: place for shard in base.glob("*.safetensors") for key, place in places_of(shard).items()}
    touched = {key for key, place in places.items() if place in AdapterChanges(weights).places}
    told = {name: report for shard in reports.values() for name, report in shard.tensors.items()}
    assert set(told) == touched and 5 < len(touched) < len(before)
    is_fp32 = next(iter(before.values())).dtype is torch.float32
    for key in before:
        if key not in touched:
            assert torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)), key
        else:
            assert told[key].changed > 0 and told[key].delta_norm > 0 and told[key].is_finite
            assert told[key].rounding < (1e-5 if is_fp32 else 0.2), (key, told[key])
    model = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    got = logits_of(model, INPUTS)
    assert differ(got, saved.base_logits[False]) > MOVED
    own = Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    want = dense_logits(lambda: own, weights, INPUTS)
    assert differ(got, want) < (5 * TOLERANCE if is_fp32 else 0.3)


def test_sums_are_rounded_once(saved: Saved, base: Path, tmp_path: Path):  # noqa: F811
    """Each value is the exact sum's nearest: in bf16 a delta that is rounded first would often miss it."""
    weights = adapter(saved, base)
    merged_into(base, tmp_path / "out", weights)
    before, after = tensors(base), tensors(tmp_path / "out")
    (key,) = [key for key in before if key.endswith("layers.1.self_attn.q_proj.weight") and "visual" not in key]
    leaf = canonical(key.removesuffix(".weight"))
    exact = before[key].double() + weights.lora[leaf].delta().double()
    nearest = exact.to(before[key].dtype)
    assert float((after[key] == nearest).double().mean()) > 0.999


def test_the_bytes_are_the_same_every_time(saved: Saved, base: Path, tmp_path: Path):  # noqa: F811
    """And headers and sizes are the base's, the hash is the file's, nothing is left beside."""
    weights = adapter(saved, base)
    first, again = (merged_into(base, tmp_path / name, weights) for name in ("one", "two"))
    assert {name: report.sha256 for name, report in first.items()} == {n: r.sha256 for n, r in again.items()}
    for name, report in first.items():
        source, target = (base / name).read_bytes(), (tmp_path / "one" / name).read_bytes()
        assert report.sha256 == hashlib.sha256(target).hexdigest() and report.num_bytes == len(target) == len(source)
        header = 8 + int.from_bytes(source[:8], "little")
        assert target[:header] == source[:header]
    assert not [file for file in (tmp_path / "one").iterdir() if file.name.startswith(".")]


@settings(max_examples=40)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([(1, 700), (130, 33), (67, 5, 2, 2), (400,), (3, 1), (0, 4), ()]),
    st.integers(1, 9),
    st.lists(st.integers(100, 20_000), min_size=1, max_size=3),
    st.integers(0, 10**6),
)
def test_how_much_is_read_at_once_does_not_matter(
    dtype: torch.dtype, shape: tuple[int, ...], rank: int, block_bytes: list[int], seed: int
):
    """To the last bit, though a matrix product's last bits depend on how many rows are asked for: those are fixed."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(shape, generator=generator).to(dtype)
    columns = math.prod(shape[1:])
    if len(shape) < 2:
        part = torch.randn(shape, generator=generator)
        weights = AdapterWeights(version="x", saved={"leaf": SavedModule(parameters={"weight": part})})
    else:
        a, b = torch.randn(rank, columns, generator=generator), torch.randn(shape[0], rank, generator=generator)
        weights = AdapterWeights(version="x", lora={"leaf": LoraFactors(a=a, b=b, scaling=0.3)})
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "TILE_VALUES", 256)
        folder = Path(name)
        save_file({"leaf.weight": own, "other": torch.arange(300)}, folder / "source")
        reports = []
        for size in (1 << 20, *block_bytes):
            target = folder / str(size)
            reports.append(merge_shard(folder / "source", target, AdapterChanges(weights), PLACES, block_bytes=size))
            assert hashlib.sha256(target.read_bytes()).hexdigest() == reports[0].sha256
        assert all(report == reports[0] for report in reports)
        after = load_file(folder / str(1 << 20))["leaf.weight"]
    if len(shape) < 2:
        assert torch.equal(after, part.to(dtype))
    elif own.numel():
        delta = weights.lora["leaf"].delta().reshape(shape).double()
        assert (after.double() - (own.double() + delta)).abs().max() <= torch.finfo(dtype).eps * 16
        told = reports[0].tensors["leaf.weight"]
        assert told.is_finite and told.delta_norm == pytest.approx(float(delta.norm()), rel=1e-5)
        assert told.changed == float((after != own).double().mean())
        lost = float((after.double() - (own.double() + delta)).norm() / delta.norm())
        assert told.rounding == pytest.approx(lost, rel=1e-2, abs=1e-4)  # of what fp32 holds


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str):
    """Writes are another thread's; its error is the caller's."""
    source = tmp_path / "model.safetensors"
    save_file({"leaf.weight": torch.zeros(3, 4)}, source)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if where == "fsync" else (shard._Sink, "_write")), full)
    with pytest.raises(OSError, match="No space left"):
        merge_shard(source, tmp_path / "out.safetensors", CHANGES, PLACES)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(("value", "dtype"), [(65_000.0, torch.float16), (3.3e38, torch.bfloat16)])
def test_what_the_dtype_cannot_hold_is_told(tmp_path: Path, value: float, dtype: torch.dtype):
    source = tmp_path / "model.safetensors"
    own = torch.zeros(3, 4, dtype=dtype)
    own[1, 2] = value
    save_file({"leaf.weight": own}, source)
    for scaling, is_finite in ((value / 20, False), (value / 1e6, True)):
        large = AdapterChanges(AdapterWeights(version="x", lora={"leaf": replace(ONES, scaling=scaling)}))
        report = merge_shard(source, tmp_path / "out.safetensors", large, PLACES).tensors["leaf.weight"]
        assert report.is_finite is is_finite


def test_a_change_without_a_place_is_refused(saved: Saved, base: Path):  # noqa: F811
    """As every change of a tied head: its embedding's tensor is not its own."""
    changes = AdapterChanges(adapter(saved, base))
    places = [place for shard in base.glob("*.safetensors") for place in places_of(shard).values()]
    tied = [place for place in places if place[0] != "lm_head"]
    with pytest.raises(UnknownModules, match=r"no lm_head\.weight.*untie the base"):
        check_all_land(changes.places, tied)


ONES = LoraFactors(a=torch.ones(1, 4), b=torch.ones(3, 1), scaling=0.5)
CHANGES = AdapterChanges(AdapterWeights(version="x", lora={"leaf": ONES}))
PLACES = {"leaf.weight": ("leaf", "weight")}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:5], "damaged"),
        (lambda data: data[:-1], "damaged"),
        (lambda data: data + b"x", "damaged"),
        (lambda data: (1 << 40).to_bytes(8, "little") + data[8:], "damaged"),
        (lambda data: data[:8] + b"!" + data[9:], "damaged"),
        (lambda data: data.replace(b'"shape":[3,4]', b'"shape":[3,3]'), "refute"),
        (lambda data: data.replace(b'"dtype":"F32"', b'"dtype":"I32"'), "quantised"),
        (lambda data: data.replace(b'[0,48]', b'[1,48]'), "damaged"),
    ],
)  # fmt: skip
def test_a_damaged_shard_leaves_nothing_behind(tmp_path: Path, damage, said: str):
    source = tmp_path / "model.safetensors"
    save_file({"leaf.weight": torch.zeros(3, 4)}, source)
    source.write_bytes(damage(source.read_bytes()))
    with pytest.raises(CheckpointRejected, match=said):
        merge_shard(source, tmp_path / "out.safetensors", CHANGES, PLACES)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_change_too_small_for_the_dtype_is_told(tmp_path: Path):
    """bf16 keeps eight bits: of a change of a thousandth of the weights, most is lost."""
    source = tmp_path / "model.safetensors"
    save_file({"leaf.weight": torch.full((3, 4), 100.0, dtype=torch.bfloat16)}, source)
    small = AdapterChanges(AdapterWeights(version="x", lora={"leaf": replace(ONES, scaling=0.1)}))
    report = merge_shard(source, tmp_path / "out.safetensors", small, PLACES).tensors["leaf.weight"]
    assert report.rounding == pytest.approx(1.0, rel=1e-4) and report.changed == 0.0
