"""A merged shard is checked from what lies on disk: each way in which it can be wrong is told, with the tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lora_runtime.errors import VerificationFailed
from lora_runtime.merge import check
from lora_runtime.merge.changes import AdapterChanges
from lora_runtime.merge.check import check_shard
from lora_runtime.merge.shard import ShardReport, TensorReport, merge_shard
from lora_runtime.weights import AdapterWeights, LoraFactors

TOUCHED = {"a.weight", "b.weight"}
NOTHING = TensorReport(delta_norm=0.0, rounding=0.0, changed=0.0, is_finite=True)


class Merged:
    """A shard of four tensors, two of them changed: one of them by nothing."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.source, self.target = folder / "source.safetensors", folder / "model.safetensors"
        tensors = {f"{name}.weight": torch.randn(50, 7, generator=generator).to(dtype) for name in "abc"}
        save_file(tensors | {"d.bias": torch.arange(5, dtype=torch.int64)}, self.source, metadata={"format": "pt"})
        factors = LoraFactors(a=torch.ones(2, 7), b=torch.ones(50, 2), scaling=1.0)
        none = LoraFactors(a=torch.ones(2, 7), b=torch.zeros(50, 2), scaling=1.0)
        changes = AdapterChanges(AdapterWeights(version="x", lora={"a": factors, "b": none}))
        places = {name: (name[0], name[2:]) for name in (*tensors, "d.bias")}
        self.report = merge_shard(self.source, self.target, changes, places)
        self.data = bytearray(self.target.read_bytes())
        self.header = 8 + int.from_bytes(self.data[:8], "little")
        self.itemsize = dtype.itemsize

    def first_byte(self, name: str) -> int:
        order = ["d.bias", "a.weight", "b.weight", "c.weight"]  # safetensors puts wider dtypes first
        return self.header + (0 if name == "d.bias" else 40 + (order.index(name) - 1) * 350 * self.itemsize)

    def check(self, touched: set[str] = TOUCHED, report: ShardReport | None = None) -> tuple[str, ...]:
        return check_shard(self.source, self.target, touched, report or self.report)


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def merged(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Merged:
    monkeypatch.setattr(check, "CHUNK_BYTES", 64)
    return Merged(tmp_path, request.param)


def test_a_sound_shard_passes_and_what_is_as_it_was_is_told(merged: Merged):
    assert merged.check() == ("b.weight",)


@pytest.mark.parametrize("chunk", [8, 256, 1 << 20])
def test_chunks_do_not_matter(merged: Merged, monkeypatch: pytest.MonkeyPatch, chunk: int):
    monkeypatch.setattr(check, "CHUNK_BYTES", chunk)
    assert merged.check() == ("b.weight",)


@pytest.mark.parametrize("name", ["c.weight", "d.bias"])
@pytest.mark.parametrize("at_end", [False, True])
def test_a_changed_bit_elsewhere(merged: Merged, name: str, at_end: bool):
    length = 40 if name == "d.bias" else 350 * merged.itemsize
    merged.data[merged.first_byte(name) + (length - 1 if at_end else 0)] ^= 1
    merged.target.write_bytes(merged.data)
    with pytest.raises(VerificationFailed, match=f"other values of '{name}'") as caught:
        merged.check()
    assert caught.value.facts == {"file": "model.safetensors", "tensor": name}


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", sorted(TOUCHED))
def test_what_is_not_finite(merged: Merged, name: str, bad: float):
    dtype = {4: torch.float32, 2: torch.float16}[merged.itemsize]
    if merged.itemsize == 2 and b'"BF16"' in merged.data:
        dtype = torch.bfloat16
    at = merged.first_byte(name) + 349 * merged.itemsize
    merged.data[at : at + merged.itemsize] = bytes(torch.tensor([bad], dtype=dtype).view(torch.uint8).tolist())
    merged.target.write_bytes(merged.data)
    with pytest.raises(VerificationFailed, match=f"NaN or infinity in '{name}'") as caught:
        merged.check()
    assert caught.value.facts["tensor"] == name


def test_the_largest_numbers_are_finite(tmp_path: Path):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        folder = tmp_path / str(dtype)
        folder.mkdir()
        merged = Merged(folder, dtype)
        at = merged.first_byte("a.weight")
        largest = torch.tensor([-torch.finfo(dtype).max], dtype=dtype)
        merged.data[at : at + dtype.itemsize] = largest.view(torch.uint8).numpy().tobytes()
        merged.target.write_bytes(merged.data)
        with pytest.raises(VerificationFailed, match="sha256"):
            merged.check()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda m: m.data[:-1], "bytes where its source has"),
        (lambda m: m.data + b"x", "bytes where its source has"),
        (lambda m: m.data[:20] + bytes([m.data[20] ^ 1]) + m.data[21:], "another header"),
        (lambda m: _with_bit(m.data, m.first_byte("a.weight")), "sha256"),
        (lambda m: m.source.read_bytes(), "sha256"),
    ],
    ids=["short", "long", "header", "other value", "never merged"],
)
def test_a_damaged_file(merged: Merged, damage: Callable[[Merged], bytes], said: str):
    merged.target.write_bytes(damage(merged))
    with pytest.raises(VerificationFailed, match=said):
        merged.check()


def test_a_report_of_other_tensors(merged: Merged):
    with pytest.raises(VerificationFailed, match=r"other tensors.*'c\.weight'"):
        merged.check(TOUCHED | {"c.weight"})
    with pytest.raises(VerificationFailed, match=r"other tensors.*'b\.weight'"):
        merged.check({"a.weight"})
    elsewhere = replace(merged.report, tensors={**merged.report.tensors, "e.weight": NOTHING})
    with pytest.raises(VerificationFailed, match=r"other tensors.*'e\.weight'"):
        merged.check(TOUCHED | {"e.weight"}, elsewhere)


def test_a_tensor_that_no_merge_writes(merged: Merged):
    report = replace(merged.report, tensors={**merged.report.tensors, "d.bias": NOTHING})
    with pytest.raises(VerificationFailed, match=r"'d\.bias', which is stored as I64"):
        merged.check(TOUCHED | {"d.bias"}, report)


@pytest.mark.parametrize("length", [1 << 50, 0, 9])
def test_a_source_that_is_damaged_by_now(merged: Merged, length: int):
    merged.source.write_bytes(length.to_bytes(8, "little") + merged.source.read_bytes()[8:])
    with pytest.raises(VerificationFailed, match="cannot be checked"):
        merged.check()


def test_values_do_not_straddle_chunks():
    assert all(check.CHUNK_BYTES % np.dtype(bits.dtype).itemsize == 0 for bits in check.INFINITE.values())


def _with_bit(data: bytearray, at: int) -> bytes:
    return bytes(data[:at]) + bytes([data[at] ^ 1]) + bytes(data[at + 1 :])
