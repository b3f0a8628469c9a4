"""Pictures through the front door: what is answered is what the sender sees, and bombs are refused by their headers."""

from __future__ import annotations

import base64
import io
import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from lora_runtime.zoo.paths import ADAPTERS, BASE_NAME
from lora_runtime.zoo.tasks import examples
from tests.served import Served

CORNERS = [f"What colour is at the {end} {side}?" for end in ("top", "bottom") for side in ("left", "right")]


@pytest.fixture(scope="module")
def http(zoo: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=zoo.url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return next(iter(examples("colour", "heldout", 1))).image.convert("RGB")


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def url_of(data: bytes) -> str:
    return "data:application/octet-stream;base64," + base64.b64encode(data).decode()


def asked(
    http: httpx.Client, picture: bytes | str, question: str = "All shapes?", model: str = "shape"
) -> httpx.Response:
    url = picture if isinstance(picture, str) else url_of(picture)
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 32}
    return http.post("/v1/chat/completions", json=body)


def answer(http: httpx.Client, picture: bytes | str, question: str = "All shapes?", model: str = "shape") -> str:
    found = asked(http, picture, question, model)
    assert found.status_code == 200, found.text
    return str(found.json()["choices"][0]["message"]["content"])


@pytest.mark.parametrize("question", CORNERS)
def test_a_turned_photo_is_answered_as_its_viewer_shows_it(http: httpx.Client, picture: Image.Image, question: str):
    upright = answer(http, saved(picture, "JPEG", quality=95), question, BASE_NAME)
    for orientation, turned in ((3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90),
                                (8, Image.Transpose.ROTATE_270)):  # fmt: skip
        exif = Image.Exif()
        exif[274] = orientation
        stored = saved(picture.transpose(turned), "JPEG", quality=95, exif=exif)
        assert answer(http, stored, question, BASE_NAME) == upright, orientation


def test_every_format_and_depth_gives_the_same_answer(http: httpx.Client, picture: Image.Image):
    right = answer(http, saved(picture, "PNG"))
    files = {
        "avif": saved(picture, "AVIF", quality=100),
        "tiff": saved(picture, "TIFF"),
        "ico": saved(picture, "ICO", sizes=[picture.size]),
        "jpeg 2000": saved(picture, "JPEG2000"),
        "webp": saved(picture, "WEBP", lossless=True),
        "opaque": saved(picture.convert("RGBA"), "PNG"),
    }
    assert {name: answer(http, data) for name, data in files.items()} == dict.fromkeys(files, right)
    grey = np.asarray(picture.convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert answer(http, saved(deep, "PNG")) == answer(http, saved(Image.fromarray(grey), "PNG"))


def test_a_transparent_background_is_white(http: httpx.Client, picture: Image.Image):
    pixels = np.asarray(picture)
    background = (pixels == pixels[0, 0]).all(-1)
    clear = np.dstack([pixels, np.where(background, 0, 255).astype(np.uint8)])
    clear[background] = 0
    white = np.where(background[..., None], 255, pixels).astype(np.uint8)
    for question, model in (("All shapes?", "shape"), *((corner, BASE_NAME) for corner in CORNERS)):
        seen = answer(http, saved(Image.fromarray(clear), "PNG"), question, model)
        assert seen == answer(http, saved(Image.fromarray(white), "PNG"), question, model), question


def test_data_urls_are_read_as_browsers_read_them(http: httpx.Client, picture: Image.Image):
    text = base64.b64encode(saved(picture, "PNG")).decode()
    lines = "\r\n".join(text[at : at + 76] for at in range(0, len(text), 76))
    right = answer(http, f"data:image/png;base64,{text}")
    escaped = text.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D")
    spelled = [
        f"DATA:image/png;BASE64,{text}",
        f"data:image/png;base64,{lines}",
        f" data:;base64,{text.rstrip('=')}",
        f"data:image/png;base64,{escaped}",
    ]
    for url in spelled:
        assert answer(http, url) == right
    refused = asked(http, "data:image/png;base64," + text.replace("+", "-").replace("/", "_"))
    assert refused.status_code == 400 and "URL-safe" in refused.json()["error"]["message"]


def png_of(width: int, height: int, body: bytes) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def bombs() -> dict[str, bytes]:
    flat = Image.new("L", (4200, 4200))
    frame, *moved = (Image.new("RGB", (64, 64), (number % 256, number // 256, 9)) for number in range(2000))
    avif = saved(Image.new("L", (6000, 6000)), "AVIF", speed=10)
    at = avif.index(b"ispe") + 8
    icon = png_of(30000, 30000, zlib.compress(bytes(1 << 20)))
    found = {kind: saved(flat, kind) for kind in ("PNG", "GIF", "JPEG", "JPEG2000", "AVIF", "WEBP")}
    found["a TIFF, compressed"] = saved(flat, "TIFF", compression="tiff_adobe_deflate")
    found["a PNG of 900 million pixels"] = png_of(30000, 30000, zlib.compress(bytes(1 << 20)))
    found["an AVIF that says it is small"] = avif[:at] + struct.pack(">II", 64, 64) + avif[at + 8 :]
    found["an icon with a large PNG"] = (
        b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(icon), 22) + icon
    )
    found["a GIF of 2000 frames"] = saved(frame, "GIF", save_all=True, append_images=moved)
    return found


def test_bombs_are_refused_soon_and_others_are_answered(http: httpx.Client, picture: Image.Image):
    for name, data in bombs().items():
        began = time.monotonic()
        found = asked(http, data)
        if "frames" in name:
            assert found.status_code == 200, "its first frame"
        else:
            assert found.status_code == 400 and "limit is 16000000" in found.json()["error"]["message"], (
                name,
                found.text,
            )
        assert time.monotonic() - began < 30, name
    assert answer(http, saved(picture, "PNG"))


def test_a_version_that_the_store_damaged_is_the_services_fault(http: httpx.Client, zoo: Served, picture: Image.Image):
    source = ADAPTERS["shape"]
    config = json.loads((source / "adapter_config.json").read_text()) | {"lora_alpha": 3}
    tensors = (source / "adapter_model.safetensors").read_bytes()
    files = [("files", ("adapter_config.json", json.dumps(config).encode())),
             ("files", ("adapter_model.safetensors", tensors))]  # fmt: skip
    made = http.post("/v1/adapters/harmed/versions", files=files)
    made.raise_for_status()
    stored = Path(zoo.log.parent, "state", "store", "versions", made.json()["version"], "adapter_model.safetensors")
    stored.write_bytes(tensors[:-100])
    refused = asked(http, saved(picture, "PNG"), model="harmed")
    assert refused.status_code == 500 and refused.json()["error"]["code"] == "version_damaged", refused.text
    assert f"harmed@{made.json()['version'][:12]}" in refused.json()["error"]["message"]
    assert answer(http, saved(picture, "PNG"))
    assert http.post("/v1/adapters/harmed/versions", files=files).status_code == 200, "which repairs it"
    assert answer(http, saved(picture, "PNG"), model="harmed")
    corrupt = [files[0], ("files", ("adapter_model.safetensors", tensors[:-100]))]
    assert http.post("/v1/adapters/harmed2/versions", files=corrupt).status_code == 400
