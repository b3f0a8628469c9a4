"""A merged shard as it lies on disk, held against the shard it was made of.

Shares nothing with what wrote it but the report: files are read anew and their headers parsed here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_runtime.errors import VerificationFailed
from lora_runtime.merge.shard import ShardReport

CHUNK_BYTES = 4 << 20
"""A multiple of every dtype's size, so that values do not straddle chunks of a tensor."""
INFINITE: dict[str, Any] = {"F32": np.uint32(0x7F80_0000), "F16": np.uint16(0x7C00), "BF16": np.uint16(0x7F80)}
"""Bits of infinity by dtype; without their sign, those of NaN are larger and all others smaller."""

Bytes = NDArray[np.uint8]


def check_shard(source: Path, target: Path, touched: Collection[str], report: ShardReport) -> tuple[str, ...]:
    """Names of the ``touched`` tensors that are in ``target`` what they are in ``source``, bit for bit.

    Raises VerificationFailed, naming the tensor where it is one's fault, unless ``target`` has ``source``'s header,
    its every other tensor bit for bit, finite values in those touched, and the hash that ``report`` says. Holds two
    chunks of 4 MiB.
    """
    checking = _Checking(source, target, frozenset(touched), report)
    with open(source, "rb", buffering=0) as before, open(target, "rb", buffering=0) as after:
        return checking.run(before, after)


class _Checking:
    def __init__(self, source: Path, target: Path, touched: frozenset[str], report: ShardReport) -> None:
        self._source, self._target = source, target
        self._touched = touched
        self._report = report
        self._before, self._after = np.empty(CHUNK_BYTES, np.uint8), np.empty(CHUNK_BYTES, np.uint8)
        self._digest = hashlib.sha256()

    def run(self, before: FileIO, after: FileIO) -> tuple[str, ...]:
        num_bytes = self._source.stat().st_size
        if not num_bytes == self._target.stat().st_size == self._report.num_bytes:
            raise self._failed(f"has {self._target.stat().st_size} bytes where its source has {num_bytes}")
        head_bytes, tensors = self._layout(before)
        names = {name for name, _ in tensors}
        if strange := sorted((self._touched - names) | (self._touched ^ self._report.tensors.keys())):
            raise self._failed(f"is reported to have changed other tensors than it was to: '{strange[0]}'", strange[0])
        same = []
        before.seek(0)
        # A thread hashes a chunk while this one compares it.
        with ThreadPoolExecutor(1, thread_name_prefix="shard-check") as thread:
            for old, new in self._chunks(before, after, head_bytes, thread):
                if not _equal(old, new):
                    raise self._failed("has another header than its source")
            for name, entry in tensors:
                if name not in self._touched:
                    self._check_same(name, self._chunks(before, after, _num_bytes(entry), thread))
                elif not self._differs(name, entry["dtype"], self._chunks(before, after, _num_bytes(entry), thread)):
                    same.append(name)
        if (found := self._digest.hexdigest()) != self._report.sha256:
            raise self._failed(f"is not what was written: its sha256 is {found}, and should be {self._report.sha256}")
        return tuple(same)

    def _check_same(self, name: str, chunks: Iterator[tuple[Bytes, Bytes]]) -> None:
        for old, new in chunks:
            if not _equal(old, new):
                raise self._failed(f"has other values of '{name}' than its source, though nothing changes it", name)

    def _differs(self, name: str, dtype: str, chunks: Iterator[tuple[Bytes, Bytes]]) -> bool:
        if (infinite := INFINITE.get(dtype)) is None:
            raise self._failed(f"changes '{name}', which is stored as {dtype}", name)
        differs = False
        for old, new in chunks:
            differs = differs or not _equal(old, new)
            values = new.view(infinite.dtype)
            if not (values & np.iinfo(infinite.dtype).max // 2).max() < infinite:
                raise self._failed(f"has NaN or infinity in '{name}'", name)
        return differs

    def _chunks(
        self, before: FileIO, after: FileIO, num_bytes: int, thread: ThreadPoolExecutor
    ) -> Iterator[tuple[Bytes, Bytes]]:
        """The next ``num_bytes`` of both files, to be looked at until the next pair; hashed when all were taken."""
        while num_bytes:
            old, new = self._before[:num_bytes], self._after[:num_bytes]
            self._fill(before, old)
            self._fill(after, new)
            hashed = thread.submit(self._digest.update, new.data)
            yield old, new
            hashed.result()
            num_bytes -= len(new)

    def _fill(self, opened: FileIO, data: Bytes) -> None:
        left = data.data
        while left:
            if not (length := opened.readinto(left)):
                raise self._failed("or its source became shorter while it was read")
            left = left[length:]

    def _layout(self, opened: FileIO) -> tuple[int, list[tuple[str, Any]]]:
        """Bytes of ``source``'s header with its length, and its tensors in the order they lie in."""
        try:
            length = int.from_bytes(opened.read(8), "little")
            entries = json.loads(opened.read(length))
            entries.pop("__metadata__", None)
            tensors = sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
            end = sum(_num_bytes(entry) for _, entry in tensors)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
            raise self._failed("cannot be checked, for its source's header cannot be read") from error
        if 8 + length + end != self._report.num_bytes:
            raise self._failed("cannot be checked, for its source's header does not describe its source")
        return 8 + length, tensors

    def _failed(self, what: str, tensor: str | None = None) -> VerificationFailed:
        return VerificationFailed(
            f"The merged shard '{self._target.name}' {what}.",
            file=self._target.name,
            **({} if tensor is None else {"tensor": tensor}),
        )


def _num_bytes(entry: Any) -> int:
    start, stop = entry["data_offsets"]
    return int(stop) - int(start)


def _equal(old: Bytes, new: Bytes) -> bool:
    """Eight bytes at a time, and what is left over."""
    whole = len(old) // 8 * 8
    return bool(
        np.array_equal(old[:whole].view(np.uint64), new[:whole].view(np.uint64))
        and np.array_equal(old[whole:], new[whole:])
    )
