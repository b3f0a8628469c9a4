"""One shard of a base checkpoint with an adapter added: same header, same places, other values where it changes.

A merge changes no shape and no dtype, so an output shard is its input shard byte for byte but for the tensors that the
adapter touches. Those go through in blocks of rows: each block is read, added to in fp32, rounded once to the shard's
dtype and written, so that memory does not grow with the model.

Shape legend: M rows and N columns of a tensor, all but its first axis flattened; a vector is one row.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lora_runtime.errors import CheckpointRejected, UnknownModules
from lora_runtime.weights import NOT_SAVED, AdapterWeights

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCK_BYTES = 2 << 20
"""Of a block in fp32: what is done to it in turn is done in the processor's cache."""
COPY_BYTES = 8 << 20
MAX_HEADER_BYTES = 100 << 20

Place = tuple[str, str]
"""A leaf and the name of its parameter, both canonical."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReport:
    """What was done to one tensor. ``delta_norm``: ‖Δ‖. ``rounding``: ‖out - (W+Δ)‖/‖Δ‖, what the dtype could not
    hold of the change. ``changed``: the share of entries that are other than before."""

    delta_norm: float
    rounding: float
    changed: float
    is_finite: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReport:
    """``sha256`` of the whole file; reports of the tensors that were changed, by their names in it."""

    sha256: str
    num_bytes: int
    tensors: Mapping[str, TensorReport]


def changed_places(weights: AdapterWeights) -> set[Place]:
    """Every parameter that ``weights`` changes."""
    places = {(leaf, name) for leaf, module in weights.saved.items() for name in module.parameters}
    places |= {(leaf, "weight") for leaf in (*weights.lora, *weights.token_rows)}
    return places | {(leaf, "bias") for leaf, factors in weights.lora.items() if factors.bias is not None}


def check_all_land(weights: AdapterWeights, places: Iterable[Place]) -> None:
    """Raise UnknownModules where a change of ``weights`` has no tensor among ``places``: nothing is lost in silence."""
    if lost := sorted(changed_places(weights) - set(places)):
        shown = ", ".join(".".join(place) for place in lost[:3])
        raise UnknownModules(
            f"The base's checkpoint holds no {shown}" + (f" (and {len(lost) - 3} more)" if len(lost) > 3 else "")
            + ", which the adapter changes. A tied head has no tensor of its own: untie the base first.",
            unmatched={".".join(place): [] for place in lost},
        )  # fmt: skip


def merge_shard(
    source: Path, target: Path, weights: AdapterWeights, places: Mapping[str, Place], *, block_bytes: int = BLOCK_BYTES
) -> ShardReport:
    """Write ``target``: the safetensors file ``source`` with ``weights`` added. ``places``: what its tensors are.

    Written beside ``target`` and renamed when it is on disk: there is all of it or nothing. The bytes depend on
    ``source`` and ``weights`` alone. Raises CheckpointRejected for a damaged file or a touched tensor of a dtype that
    cannot be added to.
    """
    touched = changed_places(weights)
    staged = target.with_name(f".{target.name}.tmp")
    reports: dict[str, TensorReport] = {}
    try:
        with open(source, "rb") as opened, open(staged, "wb") as out:
            head, tensors, size = _header(opened, source.name)
            sink = _Sink(out)
            sink.write(head)
            for name, entry in tensors:
                length = entry["data_offsets"][1] - entry["data_offsets"][0]
                place = places.get(name)
                if place not in touched or place is None:
                    for chunk in _chunks(opened, length, source.name):
                        sink.write(chunk)
                    continue
                reports[name] = _merged(opened, sink, name, entry, weights, place, block_bytes)
            out.flush()
            os.fsync(out.fileno())
        staged.rename(target)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    return ShardReport(sha256=sink.digest.hexdigest(), num_bytes=size, tensors=reports)


class _Sink:
    """A file that is hashed as it is written."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self.digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self.digest.update(data)
        self._out.write(data)


def _header(opened: BinaryIO, name: str) -> tuple[bytes, list[tuple[str, Any]], int]:
    """The header's bytes, the tensors in the order they lie in, and the file's size. The file is at its data then."""
    size = os.fstat(opened.fileno()).st_size
    prefix = opened.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise _damaged(name)
    text = opened.read(length)
    try:
        entries = {key: value for key, value in json.loads(text).items() if key != "__metadata__"}
        tensors = sorted(entries.items(), key=lambda item: item[1]["data_offsets"][0])
        end = 0
        for _, entry in tensors:
            start, stop = entry["data_offsets"]
            if start != end or stop < start or not all(isinstance(n, int) and n >= 0 for n in entry["shape"]):
                raise _damaged(name)
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(name) from error
    if 8 + length + end != size:
        raise _damaged(name)
    return prefix + text, tensors, size


def _merged(
    opened: BinaryIO, sink: _Sink, name: str, entry: Any, weights: AdapterWeights, place: Place, block_bytes: int
) -> TensorReport:
    dtype = DTYPES.get(entry["dtype"])
    shape = entry["shape"]
    if dtype is None:
        raise CheckpointRejected(
            f"'{name}' is stored as {entry['dtype']}: an adapter cannot be added to quantised weights. Merge into the "
            "checkpoint they were made of.",
            tensor=name,
        )
    rows, columns = (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))
    if (stop := entry["data_offsets"][1] - entry["data_offsets"][0]) != rows * columns * dtype.itemsize:
        raise CheckpointRejected(f"'{name}' has {stop} bytes, which its shape and dtype refute.", tensor=name)
    delta = rounded = 0.0
    num_changed, is_finite = 0, True
    step = max(1, block_bytes // (4 * max(columns, 1)))
    for first in range(0, rows, step):
        last = min(rows, first + step)
        data = bytearray((last - first) * columns * dtype.itemsize)
        if opened.readinto(data) != len(data):  # type: ignore[attr-defined]  # every binary file has it
            raise _damaged(name)
        own = torch.frombuffer(data, dtype=dtype).view(last - first, columns)
        before = own.float()
        exact = _added(weights, place, before, slice(first, last))
        result = exact.to(dtype)
        delta += float(torch.linalg.vector_norm(exact - before)) ** 2
        rounded += float(torch.linalg.vector_norm(result.float() - exact)) ** 2
        num_changed += int((result != own).sum())
        is_finite &= bool(torch.isfinite(result).all())
        sink.write(result.contiguous().view(torch.uint8).numpy().tobytes())
    norm = math.sqrt(delta)
    return TensorReport(
        delta_norm=norm,
        rounding=math.sqrt(rounded) / norm if norm else 0.0,
        changed=num_changed / max(1, rows * columns),
        is_finite=is_finite,
    )


def _added(weights: AdapterWeights, place: Place, own_MN: Tensor, rows: slice) -> Tensor:
    """W + Δ of some rows, in fp32, in the order in which an adapter's parts act: in full, by row, low-rank."""
    leaf, parameter = place
    factors = weights.lora.get(leaf)
    full = weights.saved.get(leaf, NOT_SAVED).parameters.get(parameter)
    result = own_MN.clone()
    if full is not None:
        result = (full.reshape(1, -1) if full.dim() < 2 else full.flatten(1)[rows]).float().clone()
    if parameter == "bias":
        if factors is not None and factors.bias is not None:
            result += factors.scaling * factors.bias.float()
        return result
    if (tokens := weights.token_rows.get(leaf)) is not None:
        here = (tokens.indices >= rows.start) & (tokens.indices < rows.stop)
        result[tokens.indices[here] - rows.start] = tokens.rows[here].float()
    if factors is not None:
        if factors.kind == "embedding":
            change = factors.a.T[rows].float() @ factors.b.T.float()
        else:
            change = factors.b[rows].float() @ factors.a.float()
        result += factors.scaling * change
    return result


def _chunks(opened: BinaryIO, length: int, name: str) -> Iterator[bytes]:
    while length:
        chunk = opened.read(min(COPY_BYTES, length))
        if not chunk:
            raise _damaged(name)
        length -= len(chunk)
        yield chunk


def _damaged(name: str) -> CheckpointRejected:
    return CheckpointRejected(f"'{name}' is damaged or no safetensors file. Copy it again.", file=name)
