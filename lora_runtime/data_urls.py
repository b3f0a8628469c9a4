"""``data:`` URLs as browsers read them (WHATWG Fetch, "data: URL processor", and Infra, "forgiving-base64 decode").

The scheme and ``base64`` have any case. Whitespace may stand anywhere in the base64, its padding may be left out, and
any of it may be percent-encoded. The media type is not looked at: what a picture is follows from its bytes.
"""

from __future__ import annotations

import binascii
import re
from urllib.parse import unquote_to_bytes

from lora_runtime.errors import InvalidImage

MAX_ESCAPES = 1 << 20
"""Percent signs are undone one by one. In base64 three characters of 65 can need one."""
_CONTROLS_AND_SPACE = "".join(map(chr, range(0x21)))
_WHITESPACE = b"\t\n\x0c\r "
_BASE64 = re.compile(r"; *base64\s*", re.IGNORECASE)


def is_data_url(url: str) -> bool:
    return url[:64].lstrip(_CONTROLS_AND_SPACE)[:5].lower() == "data:"


def decode_data_url(url: str, where: str) -> bytes:
    """The content of a ``data:`` URL. Raises InvalidImage, naming ``where``."""
    head, comma, body = url.partition(",")
    if not comma:
        raise InvalidImage(f"{where}: the data: URL has no ','; send 'data:image/png;base64,…'.", param="messages")
    parameter = head[head.rfind(";") :] if ";" in head else ""
    content, _, _ = body.partition("#")
    if content.count("%") > MAX_ESCAPES:
        raise InvalidImage(
            f"{where}: the data: URL has more than {MAX_ESCAPES} percent signs; send plain base64.", param="messages"
        )
    if not _BASE64.fullmatch(parameter):
        if "%" not in content:
            raise InvalidImage(f"{where}: the data: URL must be base64, 'data:image/png;base64,…'.", param="messages")
        return unquote_to_bytes(content)
    return _decoded(unquote_to_bytes(content), where)


def _decoded(encoded: bytes, where: str) -> bytes:
    encoded = encoded.translate(None, _WHITESPACE)
    if len(encoded) % 4 == 0:
        encoded = encoded.removesuffix(b"=").removesuffix(b"=")
    if b"=" in encoded:
        raise InvalidImage(f"{where}: the image's base64 is damaged: '=' stands inside it.", param="messages")
    try:
        return binascii.a2b_base64(encoded + b"=" * (-len(encoded) % 4), strict_mode=True)
    except binascii.Error as error:
        is_url_safe = bool({ord("-"), ord("_")} & set(encoded))
        hint = " It uses '-' or '_', the URL-safe alphabet; encode it with '+' and '/'." if is_url_safe else ""
        raise InvalidImage(f"{where}: the image's base64 is damaged.{hint}", param="messages") from error
