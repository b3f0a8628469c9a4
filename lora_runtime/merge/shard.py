"""One shard of a base checkpoint with a merge in it: same header, same places, other values where it changes.

A merge changes no shape and no dtype, so an output shard is its input shard byte for byte but for the tensors that
change. Those go through in blocks of rows: each block is read, added to in fp32, rounded once to the shard's dtype and
written, so that memory does not grow with the model. While a block is computed, the ones before it are hashed and
written by a second thread, and the disk is busy with the ones before those.

Shape legend: M rows and N columns of a tensor, all but its first axis flattened; a vector is M rows of one column.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_runtime.errors import CheckpointRejected
from lora_runtime.merge.changes import Change, Changes, Place

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TILE_VALUES = 1 << 19
"""How many values are computed together: 2 MiB of fp32, which stay in the processor's cache from step to step. What a
matrix product rounds to depends on how many rows are asked for, so this is part of what a merge's result is: a constant
and no setting."""
BLOCK_BYTES = 4 << 20
WRITEBACK_BYTES = 16 << 20
NUM_BLOCKS = 3
"""One to compute in, and two that are being hashed and written or wait for it."""
MAX_HEADER_BYTES = 100 << 20

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReport:
    """What was done to one tensor. ``delta_norm``: ‖Δ‖. ``rounding``: ‖out - (W+Δ)‖/‖Δ‖, what the dtype could not
    hold of the change. ``changed``: the share of entries whose bits are other than before."""

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


def merge_shard(
    source: Path, target: Path, changes: Changes, places: Mapping[str, Place], *, block_bytes: int = BLOCK_BYTES
) -> ShardReport:
    """Write ``target``: the safetensors file ``source`` with ``changes`` made. ``places``: what its tensors are.

    Written beside ``target`` and renamed when it is on disk: there is all of it or nothing. The bytes depend on
    ``source`` and ``changes`` alone, on one kind of processor: not on ``block_bytes``, how much is read and written at
    once. Holds a few blocks and tiles, a row at least of each, beside what ``changes`` holds. Raises CheckpointRejected
    for a damaged file or a touched tensor of a dtype that cannot be added to.
    """
    touched = changes.places
    staged = target.with_name(f".{target.name}.tmp")
    reports: dict[str, TensorReport] = {}
    try:
        with open(source, "rb", buffering=0) as opened, open(staged, "wb", buffering=0) as out:
            head, tensors, size = _header(opened, source.name)
            with ThreadPoolExecutor(1, thread_name_prefix="shard-writer") as thread:
                sink = _Sink(out, thread)
                sink.put(np.frombuffer(head, np.uint8).copy(), len(head))
                for name, entry in tensors:
                    place = places.get(name)
                    if place is None or place not in touched:
                        _copy(opened, sink, _num_bytes(entry), source.name, block_bytes)
                    else:
                        change = changes.at(place).prepared()
                        reports[name] = _merge(opened, sink, source.name, name, entry, change, block_bytes)
                sink.finish()
            os.fsync(out.fileno())
        staged.rename(target)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    return ShardReport(sha256=sink.digest.hexdigest(), num_bytes=size, tensors=reports)


class _Sink:
    """A file that a thread hashes and writes. Errors of the thread's are raised by the call that next waits for it."""

    def __init__(self, out: FileIO, thread: ThreadPoolExecutor) -> None:
        self._out = out
        self._thread = thread
        self._flying: deque[tuple[Future[None], Bytes]] = deque()
        self._written = self._started = 0
        self.digest = hashlib.sha256()

    def room(self, num_bytes: int) -> Bytes:
        """Memory for so many bytes or more, to fill and put; its contents are arbitrary. Waits for one in flight."""
        block = None
        if len(self._flying) >= NUM_BLOCKS - 1:
            done, block = self._flying.popleft()
            done.result()
        return block if block is not None and len(block) >= num_bytes else np.empty(num_bytes, np.uint8)

    def put(self, block: Bytes, num_bytes: int) -> None:
        """Write the first ``num_bytes`` of ``block``, which is no longer the caller's."""
        self._flying.append((self._thread.submit(self._write, block[:num_bytes]), block))

    def finish(self) -> None:
        """Wait until all is written."""
        while self._flying:
            self._flying.popleft()[0].result()

    def _write(self, data: Bytes) -> None:
        left = data.data
        self.digest.update(left)
        while left:
            left = left[self._out.write(left) :]
        self._written += len(data)
        if self._written - self._started >= WRITEBACK_BYTES and hasattr(os, "posix_fadvise"):
            # Linux begins to write such a range and does not wait: fsync finds little left to do at the end.
            os.posix_fadvise(self._out.fileno(), self._started, self._written - self._started, os.POSIX_FADV_DONTNEED)
            self._started = self._written


class _Tiles:
    """W + Δ of one tensor, tile by tile, and what is measured of it on the way, in memory that is used again."""

    def __init__(self, change: Change, rows: int, columns: int) -> None:
        """``rows``: of a tile, at most."""
        self._change = change
        self._norm = change.norm()
        self._exact_MN, self._other_MN = torch.empty(rows, columns), torch.empty(rows, columns)
        self._changed_MN = np.empty((rows, columns), np.bool_)
        self._delta = self._rounding = 0.0
        self._num_changed = self._num_values = 0
        self._is_finite = True

    def merge(self, own_MN: Tensor, out_MN: Tensor, rows: slice) -> None:
        """Fill ``out_MN`` with W + Δ of ``rows`` of the tensor, of which ``own_MN`` is W; both in the shard's dtype."""
        exact_MN, other_MN = self._exact_MN[: len(own_MN)], self._other_MN[: len(own_MN)]
        exact_MN.copy_(own_MN)
        exact_MN = self._change.added(exact_MN, rows)
        if self._norm is None:
            self._delta += _squared(torch.sub(exact_MN, other_MN.copy_(own_MN), out=other_MN))
        out_MN.copy_(exact_MN)
        lost = _squared(exact_MN.sub_(other_MN.copy_(out_MN)))
        self._rounding += lost
        # What is not finite has not lost a finite amount. The other way, squares can be too large where values are not.
        self._is_finite &= math.isfinite(lost) or bool(torch.isfinite(out_MN).all())
        changed_MN = np.not_equal(_bits(own_MN), _bits(out_MN), out=self._changed_MN[: len(own_MN)])
        self._num_changed += int(np.count_nonzero(changed_MN))
        self._num_values += own_MN.numel()

    def report(self) -> TensorReport:
        norm = math.sqrt(self._delta) if self._norm is None else self._norm
        return TensorReport(
            delta_norm=norm,
            rounding=math.sqrt(self._rounding) / norm if norm else 0.0,
            changed=self._num_changed / max(1, self._num_values),
            is_finite=self._is_finite,
        )


def _merge(
    opened: FileIO, sink: _Sink, file: str, name: str, entry: Any, change: Change, block_bytes: int
) -> TensorReport:
    """The tensor ``name`` from ``opened`` to ``sink``, changed."""
    dtype, rows, columns = _kind(name, entry)
    row_bytes = columns * dtype.itemsize
    tile_rows = max(1, TILE_VALUES // max(1, columns))
    block_rows = tile_rows * max(1, block_bytes // max(1, tile_rows * row_bytes))
    tiles = _Tiles(change, min(rows, tile_rows), columns)
    own = np.empty(min(rows, block_rows) * row_bytes, np.uint8)
    for first in range(0, rows if columns else 0, block_rows):
        num_rows = min(rows - first, block_rows)
        _fill(opened, own[: num_rows * row_bytes], file)
        out = sink.room(num_rows * row_bytes)
        own_MN, out_MN = (torch.from_numpy(b[: num_rows * row_bytes]).view(dtype).view(-1, columns) for b in (own, out))
        for start in range(0, num_rows, tile_rows):
            stop = min(num_rows, start + tile_rows)
            tiles.merge(own_MN[start:stop], out_MN[start:stop], slice(first + start, first + stop))
        sink.put(out, num_rows * row_bytes)
    return tiles.report()


def _copy(opened: FileIO, sink: _Sink, num_bytes: int, file: str, block_bytes: int) -> None:
    while num_bytes:
        length = min(num_bytes, max(1, block_bytes))
        block = sink.room(length)
        _fill(opened, block[:length], file)
        sink.put(block, length)
        num_bytes -= length


def _fill(opened: FileIO, data: Bytes, file: str) -> None:
    left = data.data
    while left:
        if not (length := opened.readinto(left)):
            raise _damaged(file)
        left = left[length:]


def _header(opened: FileIO, file: str) -> tuple[bytes, list[tuple[str, Any]], int]:
    """The header's bytes, the tensors in the order they lie in, and the file's size. The file is at its data then."""
    size = os.fstat(opened.fileno()).st_size
    prefix = opened.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise _damaged(file)
    text = opened.read(length)
    try:
        entries = {key: value for key, value in json.loads(text).items() if key != "__metadata__"}
        tensors = sorted(entries.items(), key=lambda item: item[1]["data_offsets"][0])
        end = 0
        for _, entry in tensors:
            start, stop = entry["data_offsets"]
            if start != end or stop < start or not all(isinstance(n, int) and n >= 0 for n in entry["shape"]):
                raise _damaged(file)
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file) from error
    if 8 + length + end != size:
        raise _damaged(file)
    return prefix + text, tensors, size


def _num_bytes(entry: Any) -> int:
    start, stop = entry["data_offsets"]
    return int(stop) - int(start)


def _kind(name: str, entry: Any) -> tuple[torch.dtype, int, int]:
    """The dtype of a tensor that changes, its rows and its columns."""
    dtype, shape = DTYPES.get(entry["dtype"]), entry["shape"]
    if dtype is None:
        raise CheckpointRejected(
            f"'{name}' is stored as {entry['dtype']}: an adapter cannot be added to quantised weights. Merge into the "
            "checkpoint they were made of.",
            tensor=name,
        )
    if math.prod(shape) * dtype.itemsize != (found := _num_bytes(entry)):
        raise CheckpointRejected(f"'{name}' has {found} bytes, which its shape and dtype refute.", tensor=name)
    return (dtype, math.prod(shape), 1) if len(shape) < 2 else (dtype, shape[0], math.prod(shape[1:]))


def _squared(values_MN: Tensor) -> float:
    """Σv²."""
    values = values_MN.view(-1)
    return float(torch.dot(values, values))


def _bits(values_MN: Tensor) -> NDArray[np.integer[Any]]:
    found: NDArray[np.integer[Any]] = values_MN.view({2: torch.int16, 4: torch.int32}[values_MN.itemsize]).numpy()
    return found


def _damaged(file: str) -> CheckpointRejected:
    return CheckpointRejected(f"'{file}' is damaged or no safetensors file. Copy it again.", file=file)
