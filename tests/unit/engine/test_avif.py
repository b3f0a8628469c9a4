"""Sizes of AV1 streams are read as their encoder wrote them, and reading them is bounded."""

from __future__ import annotations

import io
import struct
import time

import pytest
from PIL import Image

from lora_runtime.engine.avif import frame_sizes, is_avif


def avif(size: tuple[int, int], mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "AVIF", speed=10, **options)
    return file.getvalue()


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


@pytest.mark.parametrize("size", [(1, 1), (64, 48), (1023, 7), (3000, 2000)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_the_size_that_was_encoded_is_read(size: tuple[int, int], mode: str):
    data = avif(size, mode)
    assert is_avif(data) and frame_sizes(data) == [size] * (2 if mode == "RGBA" else 1)


def test_each_track_of_a_sequence_is_read():
    data = avif((64, 48), save_all=True, append_images=[Image.new("RGB", (64, 48), "red")])
    assert frame_sizes(data) == [(64, 48), (64, 48)], "its picture and its track"


def test_other_files_of_the_family_are_none():
    for brands in (b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heic", b"isom\0\0\0\0isom"):
        assert not is_avif(box(b"ftyp", brands) + box(b"meta", b"avif"))
    assert is_avif(box(b"ftyp", b"mif1\0\0\0\0mif1avif"))


def iloc(extents: int, items: int) -> bytes:
    """Of items whose extents take no byte of the file."""
    entry = struct.pack(">HHH", 1, 0, extents)
    return box(b"iloc", bytes(4) + b"\0\0" + struct.pack(">H", items) + entry * items)


IINF = box(b"iinf", bytes(4) + struct.pack(">H", 1) + box(b"infe", b"\2\0\0\0\0\1\0\0av01"))
START = box(b"ftyp", b"avif\0\0\0\0")


@pytest.mark.parametrize(
    "data",
    [
        START, START + box(b"meta", b""), START + box(b"meta", bytes(4) + IINF),
        START + box(b"meta", bytes(4) + IINF + iloc(65535, 65535)),
        START + box(b"meta", bytes(4) + IINF + iloc(1, 4000)) + bytes(1 << 20),
        START + box(b"free", b"") * 1_000_000,
        START + box(b"moov", box(b"stsz", struct.pack(">III", 0, 1 << 9, 1)) + box(b"stco", bytes(12))) + bytes(1 << 9),
        b"\0\0\0\0ftypavif", START[:10],
    ],
)  # fmt: skip
def test_what_is_damaged_or_endless_is_given_up_soon(data: bytes):
    began = time.monotonic()
    with pytest.raises((ValueError, LookupError, struct.error)):
        frame_sizes(data)
    assert time.monotonic() - began < 5
