"""Headers of safetensors files that a stranger wrote: read, or refused as malformed, soon and in little memory."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from lora_runtime.errors import MalformedAdapter
from lora_runtime.tensor_file import MAX_HEADER_BYTES, MAX_TENSORS, read_tensors


def tensor(shape: list[Any], offsets: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def written(header: dict[str, Any] | bytes, body: bytes = b"", claimed: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if claimed is None else claimed) + raw + body


ONE = json.dumps(tensor([1], [0, 4]))
BAD = {
    "empty": b"",
    "no header": struct.pack("<Q", 0),
    "claims 100 MB": written({}, claimed=100 << 20),
    "has 100 MB": written(b"{" + b" " * (100 << 20) + b"}"),
    "claims 2^64": written({}, claimed=2**64 - 1),
    "not UTF-8": written(b'{"\xff":1}'),
    "nested": written(b"[" * 1_000_000),
    "nested metadata": written(b'{"__metadata__":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001),
    "a list": written(b"[]"),
    "overlap": written({"a": tensor([2], [0, 8]), "b": tensor([2], [0, 8])}, bytes(8)),
    "partial overlap": written({"a": tensor([2], [0, 8]), "b": tensor([2], [4, 12])}, bytes(12)),
    "gap": written({"a": tensor([1], [0, 4]), "b": tensor([1], [8, 12])}, bytes(12)),
    "trailing bytes": written({"a": tensor([1], [0, 4])}, bytes(12)),
    "offsets beyond 2^64": written({"a": tensor([1], [2**64 - 4, 2**64])}),
    "offsets beyond the file": written({"a": tensor([2**40], [0, 2**42])}, bytes(4)),
    "offsets backwards": written({"a": tensor([1], [4, 0])}, bytes(4)),
    "offsets with a point": written({"a": tensor([1], [0.0, 4.0])}, bytes(4)),
    "negative shape": written({"a": tensor([-1], [0, 4])}, bytes(4)),
    "shape that wraps around": written({"a": tensor([2**32, 2**32], [0, 0])}),
    "shape that overflows": written({"a": tensor([2**33, 2**33], [0, 4])}, bytes(4)),
    "shape of 2^63": written({"a": tensor([2**63, 0], [0, 0])}),
    "10,000 dimensions": written({"a": tensor([1] * 10_000, [0, 4])}, bytes(4)),
    "unknown dtype": written({"a": tensor([1], [0, 4], "X9")}, bytes(4)),
    "a name twice": written(f'{{"a":{ONE},"a":{ONE}}}'.encode(), bytes(4)),
    "a name twice, spelled otherwise": written(f'{{"a":{ONE},"\\u0061":{ONE}}}'.encode(), bytes(4)),
    "a field twice": written(b'{"a":{"dtype":"F32","shape":[1],"shape":[2],"data_offsets":[0,4]}}', bytes(4)),
    "too many tensors": written({f"t{n}": tensor([0], [0, 0]) for n in range(MAX_TENSORS + 1)}),
    "half a surrogate pair": written(f'{{"\\ud800":{ONE}}}'.encode(), bytes(4)),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_hostile_headers_are_malformed(tmp_path: Path, content: bytes):
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(MalformedAdapter, match=r"adapter_model\.safetensors") as refused:
        read_tensors(tmp_path)
    assert len(refused.value.message) < 500


def test_the_limits_let_what_is_sound_pass(tmp_path: Path):
    padding = b" " * (MAX_HEADER_BYTES - 1000)
    sound = {"__metadata__": {"format": "pt"}, "a": tensor([1, 1], [0, 4]), "b": tensor([], [4, 8])}
    (tmp_path / "adapter_model.safetensors").write_bytes(written(json.dumps(sound).encode() + padding, bytes(8)))
    assert {name: tuple(found.shape) for name, found in read_tensors(tmp_path).items()} == {"a": (1, 1), "b": ()}
