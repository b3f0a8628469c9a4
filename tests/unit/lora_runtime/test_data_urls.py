"""``data:`` URLs mean here what they mean in a browser."""

from __future__ import annotations

import base64
from urllib.parse import quote, quote_from_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_runtime.data_urls import MAX_ESCAPES, decode_data_url, is_data_url
from lora_runtime.errors import InvalidImage

CONTENT = bytes(range(256)) + b"\xfb\xff\xfe?"
TEXT = base64.b64encode(CONTENT).decode()
LINES = "\r\n".join(TEXT[at : at + 76] for at in range(0, len(TEXT), 76))


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{TEXT}", f"DATA:image/png;base64,{TEXT}", f"Data:image/png;BASE64,{TEXT}",
        f"data:;base64,{TEXT}", f"data:image/png;charset=utf-8;base64,{TEXT}", f"data:image/png; base64,{TEXT}",
        f"  \n data:image/png;base64,{TEXT}", f"data:image/png;base64,{LINES}", f"data:image/png;base64,\t{TEXT}\x0c ",
        f"data:image/png;base64,{TEXT.rstrip('=')}", f"data:image/png;base64,{quote(TEXT, safe='')}",
        f"data:image/png;base64,{quote(LINES)}", f"data:image/png;base64,{TEXT}#part",
        f"data:application/octet-stream;base64,{TEXT}", f"data:image/png,{quote_from_bytes(CONTENT, safe='')}",
    ],
)  # fmt: skip
def test_what_a_browser_reads_is_read(url: str):
    assert is_data_url(url) and decode_data_url(url, "messages[0]") == CONTENT


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("data:image/png;base64", "no ','"), (f"data:image/png,{TEXT}", "must be base64"), ("data:,", "must be base64"),
        (f"data:image/png;base64url,{TEXT}", "must be base64"), (f"data:image/png;base64;q=1,{TEXT}", "must be base64"),
        ("data:image/png;base64,-_-_", "URL-safe"), ("data:image/png;base64,AAAAA", "damaged"),
        ("data:image/png;base64,AA=A", "'=' stands inside"), ("data:image/png;base64,AAA==", "'=' stands inside"),
        ("data:image/png;base64,A\u00a0AAA", "damaged"), ("data:image/png;base64,AA\u00e4A", "damaged"),
        ("data:image/png;base64," + "%41" * (MAX_ESCAPES + 1), "percent signs"),
        ("data:image/png," + "%41" * (MAX_ESCAPES + 1), "percent signs"),
        ("data:image/png;base64,AAA*", "damaged"), ("data:image/png;base64,====", "'=' stands inside"),
    ],
)  # fmt: skip
def test_the_rest_is_refused_with_a_reason(url: str, said: str):
    with pytest.raises(InvalidImage, match=said) as refused:
        decode_data_url(url, "messages[3]")
    assert refused.value.message.startswith("messages[3]: ") and refused.value.facts["param"] == "messages"


@pytest.mark.parametrize("url", ["", "http://x/data:", "dat:", "image.png", "xdata:;base64,AAAA", TEXT])
def test_other_urls_are_none(url: str):
    assert not is_data_url(url)


@given(st.binary(max_size=64), st.integers(1, 20))
def test_every_content_survives(content: bytes, width: int):
    text = base64.b64encode(content).decode()
    broken = "\n".join(text[at : at + width] for at in range(0, len(text), width))
    for body in (text, text.rstrip("="), broken, quote(broken, safe="")):
        assert decode_data_url(f"data:image/png;base64,{body}", "x") == content
