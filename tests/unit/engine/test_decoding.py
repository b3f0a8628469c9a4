"""Pictures are what their sender sees: expected pixels are made here without Pillow's conversions, format by format."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from lora_runtime.engine.decoding import FORMATS, decode_image
from lora_runtime.errors import InvalidImage

Pixels = NDArray[Any]
MAX = 1_000_000

COLOURS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[255, 255, 0], [16, 32, 64], [200, 100, 50]]], np.uint8)
PICTURE = COLOURS.repeat(16, 0).repeat(16, 1)  # 32 rows, 48 columns: no turn leaves it as it is
GREY = np.tile(np.linspace(0, 255, 48).round().astype(np.uint8), (32, 1))


def decoded(data: bytes, max_pixels: int = MAX) -> Pixels:
    image = decode_image(data, max_pixels=max_pixels, where="image 1 of 1")
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def refusal(data: bytes, max_pixels: int = MAX) -> str:
    with pytest.raises(InvalidImage, match="image 1 of 1") as refused:
        decode_image(data, max_pixels=max_pixels, where="image 1 of 1")
    return refused.value.message


def saved(image: Image.Image | Pixels, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(samples: Pixels, colour: int, depth: int, *between: bytes, size: tuple[int, int] | None = None) -> bytes:
    """A PNG written by hand. ``samples`` (height, width, channels) of ``depth`` bits; ``colour`` as in its header."""
    height, width = samples.shape[:2]
    rows = samples.reshape(height, -1)
    if depth == 16:
        packed = rows.astype(">u2").view(np.uint8)
    else:
        bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=-1)[..., 8 - depth :]
        packed = np.packbits(bits.reshape(height, -1), axis=-1)
    lines = b"".join(b"\0" + row.tobytes() for row in packed)
    width, height = size or (width, height)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(between) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def tiff(samples: Pixels, tags: dict[int, int | tuple[int, ...]], order: str = "<") -> bytes:
    """A TIFF of one uncompressed strip, written by hand. ``tags`` beside those of its size; all numbers are longs."""
    content = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    height, width = samples.shape[:2]
    all_tags = {256: width, 257: height, 259: 1, 273: 8, 278: height, 279: len(content), **tags}
    if samples.ndim == 3:
        all_tags |= {277: samples.shape[2]}
    directory, extra = b"", b""
    extra_at = 8 + len(content) + 2 + 12 * len(all_tags) + 4
    for tag, value in sorted(all_tags.items()):
        if isinstance(value, tuple):
            directory += struct.pack(order + "HHII", tag, 4, len(value), extra_at + len(extra))
            extra += struct.pack(f"{order}{len(value)}I", *value)
        else:
            directory += struct.pack(order + "HHII", tag, 4, 1, value)
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8 + len(content))
    return head + content + struct.pack(order + "H", len(all_tags)) + directory + bytes(4) + extra


# Formats


@pytest.mark.parametrize(
    ("kind", "options", "off_by"),
    [
        ("PNG", {}, 0), ("WEBP", {"lossless": True}, 0), ("BMP", {}, 0), ("TIFF", {}, 0), ("GIF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0), ("TIFF", {"compression": "tiff_adobe_deflate"}, 0),
        ("TIFF", {"compression": "packbits"}, 0), ("JPEG2000", {}, 0), ("JPEG2000", {"no_jp2": True}, 0),
        ("JPEG", {"quality": 100, "subsampling": 0}, 4), ("JPEG", {"quality": 100, "progressive": True}, 200),
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}, 4), ("WEBP", {"quality": 100}, 200),
    ],
)  # fmt: skip
def test_each_format_gives_the_pixels_that_were_saved(kind: str, options: dict[str, Any], off_by: int):
    """Lossy formats blur the edges between colours where they keep colour at half the size."""
    found = decoded(saved(PICTURE, kind, **options))
    assert found.shape == PICTURE.shape
    assert np.abs(found - PICTURE).max() <= off_by
    assert np.abs(found - PICTURE)[4:12:8, 4::16].max() <= 12, "the middle of each field"


def test_only_these_formats_are_tried():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n%%EndComments\n(x) run\n"
    others = [saved(PICTURE, kind) for kind in ("PPM", "PCX", "TGA", "SGI", "IM", "DDS", "ICNS")]
    heic = struct.pack(">I", 24) + b"ftypmif1\0\0\0\0mif1heic"
    for data in (b"", b"x", heic, b"%PDF-1.4\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>", eps, *others):
        assert "no image that can be read" in refusal(data)
    for name in FORMATS:
        assert name in refusal(b"x")


# Orientation

UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored.swapaxes(0, 1)[:, ::-1],
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: stored.swapaxes(0, 1)[::-1],
}
"""What a viewer makes of the stored pixels, by the words of the EXIF standard: 6 is "row 0 is the right side"."""


def exif(orientation: Any) -> Image.Exif:
    made = Image.Exif()
    made[274] = orientation
    return made


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(
    ("kind", "options", "off_by"),
    [
        ("PNG", {}, 0), ("WEBP", {"lossless": True}, 0), ("TIFF", {}, 0), ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("JPEG", {"quality": 100, "subsampling": 0}, 4), ("AVIF", {"quality": 100, "subsampling": "4:4:4"}, 4),
    ],
)  # fmt: skip
def test_the_orientation_is_applied(kind: str, options: dict[str, Any], off_by: int, orientation: int):
    found = decoded(saved(PICTURE, kind, exif=exif(orientation), **options))
    wanted = UPRIGHT[orientation](PICTURE)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= off_by


@pytest.mark.parametrize("orientation", [2, 6])
def test_orientation_and_transparency_go_together(orientation: int):
    alpha = np.where(PICTURE[..., :1] == 255, 0, 255).astype(np.uint8)
    found = decoded(saved(np.dstack([PICTURE, alpha]), "PNG", exif=exif(orientation)))
    assert (found == UPRIGHT[orientation](np.where(alpha == 0, 255, PICTURE))).all()


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_that_means_nothing_turns_nothing(orientation: int):
    assert (decoded(saved(PICTURE, "PNG", exif=exif(orientation))) == PICTURE).all()


@pytest.mark.parametrize(
    "block",
    [
        b"", b"Exif\0\0", b"Exif\0\0MM", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 60,
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\xff\xff\xff\x7f\0\0\0\0",  # a text of 2 GB
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x05\0\x01\0\0\0\x1a\0\0\0" + bytes(12),  # the fraction 0/0
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\x01\0\0\0\x07" * 50,
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_does_not_cost_the_picture(kind: str, block: bytes):
    options = {"lossless": True} if kind == "WEBP" else {}
    found = decoded(saved(PICTURE, kind, exif=block, **options))
    assert found.shape in (PICTURE.shape, (48, 32, 3))


# Transparency

HALF = 128 / 255


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {}),
                                               ("JPEG2000", {}), ("ICO", {"sizes": [(48, 32)]}),
                                               ("ICO", {"sizes": [(48, 32)], "bitmap_format": "bmp"})])  # fmt: skip
@pytest.mark.parametrize("level", [0, 128, 255])
def test_transparency_is_composed_on_white(kind: str, options: dict[str, Any], level: int):
    alpha = np.full((*PICTURE.shape[:2], 1), level, np.uint8)
    found = decoded(saved(np.dstack([PICTURE, alpha]), kind, **options))
    wanted = PICTURE * (level / 255) + 255 * (1 - level / 255)
    assert np.abs(found - wanted).max() <= 1


def test_what_lies_under_full_transparency_is_not_seen():
    """As drawing programs save it: black where nothing was drawn."""
    alpha = np.where((COLOURS[0, 0] == PICTURE).all(-1), 0, 255).astype(np.uint8)
    stored = np.dstack([np.where(alpha[..., None] == 0, 0, PICTURE), alpha]).astype(np.uint8)
    found = decoded(saved(stored, "PNG"))
    assert (found == np.where(alpha[..., None] == 0, 255, PICTURE)).all()


def test_grey_with_alpha_is_composed_on_white():
    alpha = np.full_like(GREY, 128)
    found = decoded(saved(np.dstack([GREY, alpha]), "PNG"))
    assert np.abs(found - (GREY * HALF + 255 * (1 - HALF))[..., None]).max() <= 1


@pytest.mark.parametrize("associated", [1, 2])
def test_premultiplied_and_plain_alpha_of_tiff_look_the_same(associated: int):
    alpha = np.full((*PICTURE.shape[:2], 1), 128, np.uint8)
    stored = (PICTURE * HALF).round().astype(np.uint8) if associated == 1 else PICTURE
    found = decoded(tiff(np.dstack([stored, alpha]), {258: (8, 8, 8, 8), 262: 2, 338: associated}))
    assert np.abs(found - (PICTURE * HALF + 255 * (1 - HALF))).max() <= 2


def test_transparent_palettes_are_composed_on_white():
    palette = chunk(b"PLTE", bytes([255, 0, 0, 0, 0, 255, 9, 9, 9]))
    samples = np.tile(np.array([0, 1, 2]), (4, 4))
    found = decoded(png(samples, 3, 8, palette, chunk(b"tRNS", bytes([255, 0, 128]))))
    assert (found[0, :2] == [[255, 0, 0], [255, 255, 255]]).all() and np.abs(found[0, 2] - 132).max() <= 1
    gif = Image.fromarray(samples.astype(np.uint8), "P")
    gif.putpalette([255, 0, 0, 0, 0, 255, 9, 9, 9])
    assert (decoded(saved(gif, "GIF", transparency=1))[0, :3] == [[255, 0, 0], [255] * 3, [9] * 3]).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("place", [0, 1])
def test_a_transparent_level_of_grey(depth: int, place: int):
    top = (1 << depth) - 1
    samples = np.tile(np.array([0, top]), (2, 4))
    found = decoded(png(samples, 0, depth, chunk(b"tRNS", struct.pack(">H", samples[0, place]))))
    assert (found[0, :2] == [[[255] * 3, [255] * 3], [[0] * 3, [255] * 3]][place]).all()


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_colour(depth: int):
    top = (1 << depth) - 1
    samples = np.tile(np.array([[top, 0, 0], [0, top, 0], [top, 0, top // 2]]), (2, 2, 1))
    found = decoded(png(samples, 2, depth, chunk(b"tRNS", struct.pack(">HHH", top, 0, 0))))
    assert (found[0, :3] == [[255, 255, 255], [0, 255, 0], [255, 0, 127]]).all()


def test_what_a_gifs_first_frame_leaves_uncovered_is_white():
    whole = saved(Image.new("RGB", (8, 4), "red"), "GIF")
    part = bytearray(saved(Image.new("RGB", (4, 4), "red"), "GIF"))
    part[6:10] = whole[6:10]  # the screen is twice as wide as the frame
    found = decoded(bytes(part))
    assert found.shape == (4, 8, 3) and (found[:, :4] == [255, 0, 0]).all() and (found[:, 4:] == 255).all()


# Depth

RAMP = np.linspace(0, 1, 48)
SCALED = np.tile(RAMP * 255, (32, 1))[..., None]
LOW, HIGH = slice(0, 12), slice(36, 48)


def ramp(low: float, high: float, dtype: Any) -> Pixels:
    levels = low + RAMP * (high - low)
    return np.tile(levels if np.dtype(dtype).kind == "f" else levels.round(), (32, 1)).astype(dtype)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_png_of_every_depth(depth: int):
    top = (1 << depth) - 1
    samples = ramp(0, top, np.uint16)
    assert np.abs(decoded(png(samples, 0, depth)) - (samples / top * 255)[..., None]).max() <= 1


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_colour_and_alpha_png_of_16_bits(colour: int, channels: int):
    samples = np.repeat(ramp(0, 65535, np.uint16)[..., None], channels, -1)
    if colour != 2:
        samples[..., -1] = 65535
    assert np.abs(decoded(png(samples, colour, 16)) - SCALED).max() <= 1


@pytest.mark.parametrize(
    ("samples", "tags"),
    [
        (ramp(0, 65535, np.uint16), {258: 16, 262: 1}),
        (ramp(0, 2**32 - 1, np.uint32), {258: 32, 262: 1}),
        (ramp(-(2**15), 2**15 - 1, np.int16), {258: 16, 262: 1, 339: 2}),
        (ramp(-(2**31), 2**31 - 1, np.int32), {258: 32, 262: 1, 339: 2}),
        (ramp(-128, 127, np.int8), {258: 8, 262: 1, 339: 2}),
        (ramp(0, 1, np.float32), {258: 32, 262: 1, 339: 3}),
        (ramp(1, 0, np.float32), {258: 32, 262: 0, 339: 3}),
    ],
)
@pytest.mark.parametrize("order", "<>")
def test_deep_grey_tiff_is_scaled_by_its_samples_range(samples: Pixels, tags: dict[int, Any], order: str):
    if samples.dtype == np.uint32 and order == ">":
        pytest.skip("Pillow has no such mode")
    assert np.abs(decoded(tiff(samples, tags, order)) - SCALED).max() <= 1


def test_white_is_zero():
    assert np.abs(decoded(tiff(ramp(65535, 0, np.uint16), {258: 16, 262: 0})) - SCALED).max() <= 1
    assert np.abs(decoded(tiff(ramp(255, 0, np.uint8), {258: 8, 262: 0})) - SCALED).max() <= 1


def test_twelve_bits_are_scaled_from_twelve():
    pairs = ramp(0, 4095, np.uint16).reshape(32, 24, 2).astype(int)
    first, second = pairs[..., 0], pairs[..., 1]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).reshape(32, 72).astype(np.uint8)
    assert np.abs(decoded(tiff(packed, {256: 48, 258: 12, 262: 1})) - SCALED).max() <= 1


@pytest.mark.parametrize(("kind", "off_by"), [("JPEG2000", 1), ("TIFF", 1), ("PNG", 1)])
def test_dark_deep_pictures_stay_dark(kind: str, off_by: int):
    """Scaled by the range of the samples' type, not by the brightest pixel."""
    found = decoded(saved(ramp(0, 6000, np.uint16), kind))
    assert np.abs(found - SCALED * 6000 / 65535).max() <= off_by


def test_floating_point_runs_from_0_to_1_and_is_clipped():
    samples = np.array([[-1.0, 0.0, 0.5, 1.0, 7.0, np.nan, np.inf, -np.inf]], np.float32)
    found = decoded(tiff(samples, {258: 32, 262: 1, 339: 3}))
    assert found[0, :, 0].tolist() == [0, 0, 128, 255, 255, 0, 255, 0]


@pytest.mark.parametrize("order", "<>")
def test_colour_tiff_of_16_bits(order: str):
    samples = np.repeat(ramp(0, 65535, np.uint16)[..., None], 3, -1)
    assert np.abs(decoded(tiff(samples, {258: (16, 16, 16), 262: 2}, order)) - SCALED).max() <= 1


# Colours


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind: str):
    """Adobe's JPEG files hold ink inverted; black ink on paper is black all the same."""
    inks = Image.new("CMYK", (16, 16), (0, 0, 0, 255))
    inks.paste((0, 255, 255, 0), (8, 0, 16, 16))
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    found = decoded(saved(inks, kind, **options))
    assert np.abs(found[:, :6]).max() <= 4 and np.abs(found[:, 10:] - [255, 0, 0]).max() <= 4


def test_lab():
    """White, black, and sRGB's red, which is L* 53.2, a* 80.1, b* 67.2."""
    samples = np.array([[[255, 0, 0], [0, 0, 0], [136, 80, 67]]], np.uint8)
    found = decoded(tiff(samples, {258: (8, 8, 8), 262: 8}))
    assert np.abs(found[0, 0] - 255).max() <= 2 and np.abs(found[0, 1]).max() <= 2
    assert np.abs(found[0, 2] - [255, 0, 0]).max() <= 16


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr"])
def test_other_modes(mode: str):
    image = Image.fromarray(PICTURE)
    kept = image.quantize(8) if mode == "P" else image.convert(mode)
    wanted = np.asarray(kept.convert("RGB")).astype(int)
    assert np.abs(decoded(saved(kept, "TIFF")) - wanted).max() <= 1


# Frames


def frames(kind: str) -> bytes:
    second = Image.new("RGB", (48, 32), "white")
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "AVIF" else {}
    return saved(PICTURE, kind, save_all=True, append_images=[second, Image.new("RGB", (48, 32), "red")], **options)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF", "MPO"])
def test_only_the_first_frame_is_decoded(kind: str, monkeypatch: pytest.MonkeyPatch):
    found = decoded(frames(kind))
    assert np.abs(found - PICTURE)[4:12:8, 4::16].max() <= 12
    with Image.open(io.BytesIO(frames(kind))) as image:
        assert image.n_frames == 3
        owner = type(image)
    sought: list[int] = []
    seek = owner.seek

    def seeking(self: Image.Image, frame: int) -> None:
        sought.append(frame)
        seek(self, frame)

    monkeypatch.setattr(owner, "seek", seeking)
    decoded(frames(kind))
    assert set(sought) <= {0}


def icon(*entries: tuple[int, int, bytes], bits: int = 32) -> bytes:
    """An icon of (width, height, file) entries."""
    head, body = b"\0\0\1\0" + struct.pack("<H", len(entries)), b""
    for width, height, file in entries:
        at = 6 + 16 * len(entries) + len(body)
        head += struct.pack("<BBBBHHII", width & 255, height & 255, 0, 0, 1, bits, len(file), at)
        body += file
    return head + body


def test_an_icon_is_its_largest_picture():
    small, large = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (32, 32), "blue")
    found = decoded(icon((16, 16, saved(small, "PNG")), (32, 32, saved(large, "PNG"))))
    assert found.shape == (32, 32, 3) and (found == [0, 0, 255]).all()


def test_an_icon_of_256_pixels():
    assert decoded(icon((256, 256, saved(Image.new("RGB", (256, 256), "blue"), "PNG")))).shape == (256, 256, 3)


# Limits


def bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


def jpeg2000(width: int, height: int, tile_width: int, tile_height: int, components: int = 3) -> bytes:
    size = struct.pack(">8IH", width, height, 0, 0, tile_width, tile_height, 0, 0, components)
    body = struct.pack(">H", 0) + size + bytes([7, 1, 1]) * components
    return b"\xff\x4f\xff\x51" + struct.pack(">H", 2 + len(body)) + body


def in_jp2(codestream: bytes, width: int, height: int) -> bytes:
    def box(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(content), kind) + content

    header = box(b"ihdr", struct.pack(">IIHBBBB", height, width, 3, 7, 7, 0, 0)) + box(b"colr", b"\1\0\0\0\0\0\x10")
    start = box(b"jP  ", b"\r\n\x87\n") + box(b"ftyp", b"jp2 \0\0\0\0jp2 ")
    return start + box(b"jp2h", header) + box(b"xml ", b"\xff\x4f\xff\x51" + bytes(60)) + box(b"jp2c", codestream)


def spoofed(data: bytes, name: bytes, at: int, numbers: bytes) -> bytes:
    """``data`` with other bytes some way after ``name``."""
    place = data.index(name) + at
    return data[:place] + numbers + data[place + len(numbers) :]


SMALL, LARGE = Image.new("L", (1, 1)), Image.new("L", (1200, 1200))
TOO_LARGE = {
    "png": png(np.zeros((1, 1)), 0, 8, size=(60000, 60000)),
    "png, no header fits": png(np.zeros((1, 1)), 0, 8, size=(1 << 30, 1 << 30)),
    "bmp": bmp(60000, 60000),
    "gif": b"GIF89a" + struct.pack("<HH", 60000, 60000) + saved(SMALL, "GIF")[10:],
    "gif, a frame beyond its screen": spoofed(saved(SMALL, "GIF"), b",\0\0\0\0", 5, b"\xff\xff\xff\xff"),
    "jpeg": spoofed(saved(Image.new("L", (16, 16)), "JPEG"), b"\xff\xc0", 5, struct.pack(">HH", 60000, 60000)),
    "webp": b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X\x0a\0\0\0\x02\0\0\0" + b"\xfe\x3f\0" * 2,
    "tiff": tiff(np.zeros((1, 1), np.uint8), {256: 60000, 257: 60000, 258: 8, 262: 1}),
    "tiff, a tile": tiff(
        np.zeros((4, 4), np.uint8), {258: 8, 259: 8, 262: 1, 322: 60000, 323: 60000, 324: 8, 325: 16}),
    "avif": spoofed(saved(PICTURE, "AVIF"), b"ispe", 8, struct.pack(">II", 16000, 16000)),
    "avif that says it is small": spoofed(saved(LARGE, "AVIF"), b"ispe", 8, struct.pack(">II", 64, 64)),
    "avif sequence that says it is small": spoofed(
        saved(LARGE, "AVIF", save_all=True, append_images=[Image.new("L", (1200, 1200), 255)]), b"ispe", 8,
        struct.pack(">II", 64, 64)),
    "jpeg 2000": jpeg2000(60000, 60000, 60000, 60000),
    "jp2 that says it is small": in_jp2(jpeg2000(60000, 60000, 60000, 60000), 16, 16),
    "an icon's png": icon((16, 16, png(np.zeros((1, 1)), 0, 8, size=(60000, 60000)))),
    "an icon's bitmap": icon((16, 16, bmp(60000, 60000)[14:])),
}  # fmt: skip


@pytest.mark.parametrize("data", TOO_LARGE.values(), ids=TOO_LARGE)
def test_too_many_pixels_are_refused_by_the_header(data: bytes, monkeypatch: pytest.MonkeyPatch):
    def nothing(*_: object) -> None:
        raise AssertionError("decoding began")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", nothing)
    assert "the limit is" in refusal(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF", "TIFF", "JPEG2000"])
def test_the_limit_is_exact(kind: str):
    data = saved(PICTURE, kind)
    assert decoded(data, max_pixels=48 * 32).shape == PICTURE.shape
    assert "48x32 = 1536 pixels; the limit is 1535" in refusal(data, max_pixels=48 * 32 - 1)


def test_work_out_of_proportion_is_refused():
    assert "JPEG 2000 tiles" in refusal(jpeg2000(900, 900, 1, 1))
    assert "components" in refusal(jpeg2000(16, 16, 16, 16, components=16384))
    scans = saved(PICTURE, "JPEG", progressive=True)
    at = scans.rindex(b"\xff\xda")
    assert "scans" in refusal(scans[:at] + scans[at:-2] * 300 + scans[-2:])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF", "TIFF", "JPEG2000", "ICO"])
def test_what_is_damaged_is_an_invalid_image_and_nothing_else(kind: str):
    """Cut short anywhere, or with bytes turned over: pixels, or a message."""
    whole = saved(PICTURE, kind)
    random = np.random.default_rng(0)
    cut = [whole[: int(len(whole) * share)] for share in np.linspace(0.02, 0.98, 25)]
    for data in cut:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            try:
                decoded(data)
            except InvalidImage as error:
                assert error.message.startswith("image 1 of 1 is ")
    for _ in range(150):
        flipped = bytearray(whole)
        for at in random.integers(0, min(len(whole), 400), 3):
            flipped[at] ^= int(random.integers(1, 256))
        try:
            decoded(bytes(flipped))
        except InvalidImage as error:
            assert "image 1 of 1" in error.message


def test_text_bombs_of_png_are_refused():
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 << 20)))
    assert "damaged" in refusal(png(np.zeros((2, 2)), 0, 8, text))
