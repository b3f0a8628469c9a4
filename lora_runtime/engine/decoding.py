"""Image files to RGB pixels as a viewer shows them, under limits that hold before any pixel is decoded.

What a picture means, whatever its format:

- The first frame is taken; later frames and pages are never decoded.
- The EXIF orientation is applied. A broken EXIF block counts as none.
- Transparency is composed on white, as vLLM does.
- Deep samples are scaled from the range that their type has, never from the values that occur: 12, 16 and 32 bit
  integers from the whole range, floating point from 0 (black) to 1 (white), clipped outside.
- CMYK is converted by Pillow's plain formula, CIELAB through sRGB. Embedded colour profiles are not applied: bases are
  trained on pixels read without them, and vLLM reads none either.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.ExifTags import Base

from lora_runtime.engine.avif import frame_sizes, is_avif
from lora_runtime.errors import InvalidImage

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF", "TIFF", "JPEG2000", "ICO")
"""All that Pillow may try. Formats that run programs (EPS) or are read by few eyes are not among them."""
MAX_JPEG_SCANS = 256
"""Each scan passes over the whole picture and may take 30 bytes; encoders write about ten."""
MAX_JPEG2000_TILES = 4096
"""OpenJPEG allocates 10 KB for each that a header announces."""

MAX_AVIF_PICTURES = 4
"""An AVIF file holds colour, alpha and a gain map as pictures of their own, cut into tiles that may overhang."""

_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation: what brings the stored pixels upright."""
_BITS, _PHOTOMETRIC, _TILE_WIDTH, _TILE_HEIGHT, _SAMPLE_FORMAT = 258, 262, 322, 323, 339
_WHITE_IS_ZERO, _SIGNED = 0, 2
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Pillow warns of what is odd about a file. The files are strangers', and the log is not theirs to fill.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode_image(data: bytes, *, max_pixels: int, where: str) -> Image.Image:
    """Decode ``data`` to RGB, as the module's docstring has it.

    Raises InvalidImage, naming ``where``, for anything but a sound image of at most ``max_pixels``.
    """
    try:
        return _decoded(data, max_pixels, where)
    except InvalidImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidImage(f"{where} is far too large; the limit is {max_pixels} pixels.", limit=max_pixels) from error
    except UnidentifiedImageError as error:
        raise InvalidImage(f"{where} is no image that can be read; send one of {', '.join(FORMATS)}.") from error
    except Exception as error:  # decoders raise whatever a damaged file makes of them
        raise InvalidImage(f"{where} is damaged: {_said(error)}. Send the whole file.") from error


def _decoded(data: bytes, max_pixels: int, where: str) -> Image.Image:
    if data[:4] == b"\0\0\1\0":
        data = _largest_of_icon(data)
    for width, height in _announced(data):
        _check_size(width, height, max_pixels, where)
    _check_work(data, max_pixels, where)
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_size(*image.size, max_pixels, where)
        tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
        _check_size(_first(tags, _TILE_WIDTH, 0), _first(tags, _TILE_HEIGHT, 0), max_pixels, where)
        covered = image.tile[0][1] if image.format == "GIF" and image.tile else None
        image.load()
        rgb = _rgb(image, data, tags)
        if covered is not None and covered != (0, 0, *image.size):
            rgb = _placed(rgb.crop(covered), covered, image.size)
        turn = _TURNED.get(_orientation(image))
        return rgb if turn is None else rgb.transpose(turn)


def _check_size(width: int, height: int, max_pixels: int, where: str) -> None:
    if width * height > max_pixels:
        raise InvalidImage(
            f"{where} is {width}x{height} = {width * height} pixels; the limit is {max_pixels}. Send a smaller image.",
            pixels=width * height,
            limit=max_pixels,
        )


def _check_work(data: bytes, max_pixels: int, where: str) -> None:
    """Refuse what takes time or memory out of proportion to its pixels."""
    if is_avif(data):
        sizes = frame_sizes(data)
        if sum(width * height for width, height in sizes) > MAX_AVIF_PICTURES * max_pixels:
            raise InvalidImage(
                f"{where} has {len(sizes)} AV1 pictures, the largest {max(sizes)}: too many pixels for one image; the "
                f"limit is {max_pixels}. Send a smaller image.",
                limit=max_pixels,
            )
    # Inside compressed JPEG data a 0xFF byte is always followed by a zero, so this counts markers.
    if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise InvalidImage(f"{where} has more than {MAX_JPEG_SCANS} JPEG scans. Save it again.")
    if (size := _jpeg2000_size(data)) is not None:
        (x1, y1, _, _, tile_width, tile_height, tile_x0, tile_y0), components = size
        across = -(-(x1 - tile_x0) // max(tile_width, 1))
        down = -(-(y1 - tile_y0) // max(tile_height, 1))
        if across * down > MAX_JPEG2000_TILES or components > 4:
            raise InvalidImage(
                f"{where} has {across * down} JPEG 2000 tiles and {components} components; at most "
                f"{MAX_JPEG2000_TILES} and 4 are read. Save it again."
            )


def _announced(data: bytes) -> Iterator[tuple[int, int]]:
    """Sizes in headers that Pillow acts on before it says how large the picture is, or does not look at."""
    if is_avif(data):
        yield from frame_sizes(data)
    if (size := _jpeg2000_size(data)) is not None:
        (x1, y1, x0, y0, *_), _ = size
        yield max(x1 - x0, 0), max(y1 - y0, 0)
    if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X" and len(data) >= 30:
        yield int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if data[:4] == b"\0\0\1\0":  # an icon of one bitmap, whose height counts the mask too
        at = int.from_bytes(data[18:22], "little")
        header, width, height = struct.unpack_from("<Iii", data, at)
        if header == 12:
            width, height = struct.unpack_from("<HH", data, at + 4)
        yield abs(width), abs(height) // 2


def _jpeg2000_size(data: bytes) -> tuple[tuple[int, ...], int] | None:
    """The eight numbers of a codestream's size segment, in its order, and how many components it has."""
    at = 0 if data[:4] == b"\xff\x4f\xff\x51" else _codestream_of_jp2(data)
    if at is None or data[at : at + 4] != b"\xff\x4f\xff\x51" or len(data) < at + 42:
        return None
    *numbers, components = struct.unpack_from(">8IH", data, at + 8)
    return tuple(numbers), components


def _codestream_of_jp2(data: bytes) -> int | None:
    """Where the first codestream of a JP2 file begins, going from box to box as OpenJPEG does."""
    at = 0
    while data[4:8] == b"jP  " and at + 16 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        head = 8
        if size == 1:
            size, head = struct.unpack_from(">Q", data, at + 8)[0], 16
        if kind == b"jp2c":
            return at + head
        if size < head:
            return None
        at += size
    return None


def _largest_of_icon(data: bytes) -> bytes:
    """The largest and deepest picture of an icon: a PNG file, or an icon with nothing else in it.

    Pillow decodes an icon when it is opened, before its size can be asked for, and prefers shallow colours.
    """
    count = struct.unpack_from("<H", data, 4)[0]
    entries = [data[at : at + 16] for at in range(6, 6 + 16 * count, 16)]
    best = max((entry for entry in entries if len(entry) == 16), key=lambda e: ((e[0] or 256) * (e[1] or 256), e[6:8]))
    size, at = struct.unpack_from("<II", best, 8)
    picture = data[at : at + size]
    if picture.startswith(_PNG_SIGNATURE):
        return picture
    return b"\0\0\1\0\1\0" + best[:12] + struct.pack("<I", 22) + picture


def _rgb(image: Image.Image, data: bytes, tags: Mapping[int, Any]) -> Image.Image:
    """The loaded ``image``, read from ``data``, in 8 bits a channel and on white."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _shallow(image, tags)
    elif image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.applyTransform(image, ImageCms.buildTransform(lab, srgb, "LAB", "RGB")) or image
    elif image.mode == "L" and _first(tags, _SAMPLE_FORMAT, 1) == _SIGNED:
        image = image.point(lambda level: (level + 128) % 256)
    if image.format == "PNG" and "transparency" in image.info:
        image.info["transparency"] = _transparent(image.info["transparency"], image.mode, depth=data[24])
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return _placed(rgba, (0, 0, *rgba.size), rgba.size)


def _placed(image: Image.Image, box: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
    """``image`` at ``box`` on white of ``size``."""
    white = Image.new("RGB", size, "white")
    white.paste(image, box, image.getchannel("A") if image.mode == "RGBA" else None)
    return white


def _shallow(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Deep grey samples in 8 bits, with alpha where a PNG calls one level transparent."""
    samples, bits = np.asarray(image), _first(tags, _BITS, 16)
    low, high = 0, (1 << bits) - 1
    if image.mode == "F":
        high = 1
    elif _first(tags, _SAMPLE_FORMAT, 1) == _SIGNED:
        low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    elif image.mode == "I":
        samples = samples.view(np.uint32)  # Pillow has no unsigned mode of 32 bits
    levels = (samples.astype(np.float32) - low) * np.float32(255 / (high - low))
    grey = np.rint(np.clip(np.nan_to_num(levels, nan=0.0, posinf=255.0, neginf=0.0), 0, 255)).astype(np.uint8)
    if _first(tags, _PHOTOMETRIC, 1) == _WHITE_IS_ZERO:
        grey = 255 - grey
    shallow = Image.fromarray(grey)
    if isinstance(transparent := image.info.get("transparency"), int):
        shallow.putalpha(Image.fromarray(np.where(samples == transparent, 0, 255).astype(np.uint8)))
    return shallow


def _transparent(said: Any, mode: str, *, depth: int) -> Any:
    """The transparent level or colour of a PNG of ``depth`` bits a sample, as Pillow's 8 bits have it."""
    if isinstance(said, int) and mode in ("1", "L"):
        return said * 255 // ((1 << depth) - 1)
    if isinstance(said, tuple) and depth == 16:
        return tuple(level >> 8 for level in said)
    return said


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of a loaded image, 1 where there is none. Pillow has turned a TIFF by then."""
    try:
        found = image.getexif().get(Base.Orientation, 1)
    except Exception:  # as many kinds as there are ways to break it, and the pixels are sound
        return 1
    return found if isinstance(found, int) else 1


def _first(tags: Mapping[int, Any], tag: int, default: int) -> int:
    """A TIFF tag's number, or the first of its numbers."""
    found = tags.get(tag, default)
    return int(found[0] if isinstance(found, tuple) else found)


def _said(error: Exception) -> str:
    return (str(error) or type(error).__name__).rstrip(".")[:200]
