"""How large the frames inside an AVIF file are, from its AV1 sequence headers, without decoding any.

The size that an AVIF file states beside its pictures is not binding: a decoder decodes what the AV1 stream
inside says, and scales that down afterwards. A file of 4 KB can hold 256 million pixels and say that it is 64x64.

Follows ISO/IEC 14496-12 and 23008-12 (boxes) and the AV1 bitstream specification, 5.3 to 5.5. Raises ValueError,
LookupError or struct.error for a file that is damaged.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass

MAX_PARTS = 4096
"""Boxes in a box, extents of a picture, units of a stream: no file needs as many, and each takes time here."""
_SEQUENCE_HEADER = 1
_CONTAINERS = frozenset({b"moov", b"trak", b"mdia", b"minf", b"stbl"})


def is_avif(data: bytes) -> bool:
    """Whether the file says among its brands that it is one; decoders take no other."""
    size = int.from_bytes(data[:4])
    brands = data[8 : size if size >= 16 else len(data)]
    return data[4:8] == b"ftyp" and (b"avif" in brands or b"avis" in brands)


def frame_sizes(data: bytes) -> list[tuple[int, int]]:
    """Width and height of every sequence header in the file's still pictures and in the first sample of each track."""
    found = [size for stream in _streams(data) for size in _sequence_headers(stream)]
    if not found:
        raise ValueError("it has no AV1 sequence header")
    return found


def _streams(data: bytes) -> Iterator[bytes]:
    for kind, start, end in _boxes(data, 0, len(data)):
        if kind == b"meta":
            yield from _items(data, start + 4, end)
        elif kind == b"moov":
            yield from _first_samples(data, start, end)


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The kind of each box and where its content begins and ends."""
    for number in itertools.count():
        if at + 8 > end:
            return
        _check_few(number)
        size, kind = struct.unpack_from(">I4s", data, at)
        head = 8
        if size == 1:
            size, head = struct.unpack_from(">Q", data, at + 8)[0], 16
        elif size == 0:
            size = end - at
        if size < head or at + size > end:
            raise ValueError("a box is longer than what it is in")
        yield kind, at + head, at + size
        at += size


def _items(data: bytes, start: int, end: int) -> Iterator[bytes]:
    """The AV1 streams of a ``meta`` box's items."""
    inside = {kind: (at, stop) for kind, at, stop in _boxes(data, start, end)}
    coded = _coded_items(data, *inside[b"iinf"])
    idat = inside.get(b"idat", (0, 0))
    left_bytes = 2 * len(data)
    for item, method, extents in _locations(_Bits(data, *inside[b"iloc"])):
        if item in coded:
            base = idat[0] if method == 1 else 0
            left_bytes -= sum(size or len(data) for _, size in extents)
            if left_bytes < 0:
                raise ValueError("its pictures share their bytes")
            yield b"".join(data[base + at : base + at + size if size else len(data)] for at, size in extents)


def _coded_items(data: bytes, start: int, end: int) -> set[int]:
    head = 6 if data[start] == 0 else 8
    found = set()
    for _, at, _ in _boxes(data, start + head, end):
        wide = data[at] >= 3
        item = int.from_bytes(data[at + 4 : at + (8 if wide else 6)])
        kind_at = at + (10 if wide else 8)
        if data[kind_at : kind_at + 4] == b"av01":
            found.add(item)
    return found


def _locations(bits: _Bits) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Of each item: its id, its construction method, and offset and size of its extents."""
    version = bits.read(8)
    bits.read(24)
    offset_size, length_size, base_size, index_size = (8 * bits.read(4) for _ in range(4))
    wide, num_extents = 32 if version == 2 else 16, 0
    for _ in range(bits.read(wide)):
        item = bits.read(wide)
        method = bits.read(16) & 15 if version else 0
        bits.read(16)
        base, extents = bits.read(base_size), []
        for _ in range(bits.read(16)):
            num_extents += 1
            _check_few(num_extents)
            if version:
                bits.read(index_size)
            extents.append((base + bits.read(offset_size), bits.read(length_size)))
        yield item, method, extents


def _first_samples(data: bytes, start: int, end: int) -> Iterator[bytes]:
    place, size = None, 0
    for kind, at, stop in _boxes(data, start, end):
        if kind in _CONTAINERS:
            yield from _first_samples(data, at, stop)
        elif kind == b"stsz":
            same, count = struct.unpack_from(">II", data, at + 4)
            size = same or (struct.unpack_from(">I", data, at + 12)[0] if count else 0)
        elif kind in (b"stco", b"co64"):
            place = struct.unpack_from(">I" if kind == b"stco" else ">Q", data, at + 8)[0]
    if place is not None:
        yield data[place : place + size]


def _sequence_headers(stream: bytes) -> Iterator[tuple[int, int]]:
    """The largest frame that each sequence header of an AV1 stream allows."""
    at = 0
    for number in itertools.count():
        if at >= len(stream):
            return
        _check_few(number)
        head, end = stream[at], len(stream)
        at += 2 if head & 4 else 1
        if head & 2:
            size, at = _leb128(stream, at)
            end = at + size
        if head >> 3 & 15 == _SEQUENCE_HEADER:
            yield _frame_size(_Bits(stream, at, end))
        at = end


def _check_few(number: int) -> None:
    if number > MAX_PARTS:
        raise ValueError("it has too many parts")


def _leb128(stream: bytes, at: int) -> tuple[int, int]:
    value = 0
    for number in range(8):
        value |= (stream[at + number] & 127) << 7 * number
        if stream[at + number] < 128:
            return value, at + number + 1
    raise ValueError("a number of AV1 is longer than 8 bytes")


def _frame_size(bits: _Bits) -> tuple[int, int]:
    bits.read(4)  # profile, whether it is a still picture
    if bits.read(1):  # a reduced header
        bits.read(5)
    else:
        _skip_timing(bits)
    width_bits, height_bits = bits.read(4) + 1, bits.read(4) + 1
    return bits.read(width_bits) + 1, bits.read(height_bits) + 1


def _skip_timing(bits: _Bits) -> None:
    has_model, delay_bits = 0, 0
    if bits.read(1):  # timing
        bits.read(64)
        if bits.read(1):  # all frames last equally long: a variable-length number
            zeros = 0
            while not bits.read(1):
                zeros += 1
                _check_few(zeros)
            bits.read(zeros if zeros < 32 else 0)
        if has_model := bits.read(1):
            delay_bits = bits.read(5) + 1
            bits.read(42)
    has_delay = bits.read(1)
    for _ in range(bits.read(5) + 1):  # operating points
        bits.read(12)
        if bits.read(5) > 7:
            bits.read(1)
        if has_model and bits.read(1):
            bits.read(2 * delay_bits + 1)
        if has_delay and bits.read(1):
            bits.read(4)


@dataclass
class _Bits:
    """Reads the bytes from ``start`` to ``end`` bit by bit, from the highest on. Beyond the end is a LookupError."""

    data: bytes
    start: int
    end: int

    def __post_init__(self) -> None:
        self._at = 8 * self.start

    def read(self, count: int) -> int:
        first, last = self._at // 8, -(-(self._at + count) // 8)
        if last > min(self.end, len(self.data)):
            raise LookupError("the file ends too early")
        whole = int.from_bytes(self.data[first:last])
        self._at += count
        return whole >> (8 * last - self._at) & ((1 << count) - 1)
