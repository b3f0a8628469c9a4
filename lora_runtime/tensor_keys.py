"""What a tensor's name in an adapter file means, whatever PEFT version, wrapper or adapter name wrote it."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

Role = Literal["a", "b", "b_bias", "embedding_a", "embedding_b", "tokens", "magnitude", "parameter"]


class TensorKey(NamedTuple):
    """``module`` as spelled in the file, wrappers included; ``parameter`` only for role "parameter"."""

    module: str
    role: Role
    parameter: str = ""


_NAMES = r"(?:\.[A-Za-z0-9_\-]+)*?"
"""Adapter names that PEFT or a trainer left inside a key: ``default``, ``default.default``, …"""

_PATTERNS: tuple[tuple[re.Pattern[str], Role], ...] = (
    (re.compile(rf"(.+)\.lora_A{_NAMES}\.weight"), "a"),
    (re.compile(rf"(.+)\.lora_B{_NAMES}\.weight"), "b"),
    (re.compile(rf"(.+)\.lora_B{_NAMES}\.bias"), "b_bias"),
    (re.compile(rf"(.+)\.lora_embedding_A{_NAMES}"), "embedding_a"),
    (re.compile(rf"(.+)\.lora_embedding_B{_NAMES}"), "embedding_b"),
    (re.compile(rf"(.+)\.token_adapter\.trainable_tokens_delta{_NAMES}"), "tokens"),
    (re.compile(rf"(.+)\.lora_magnitude_vector{_NAMES}(?:\.weight)?"), "magnitude"),
)
_SAVED = re.compile(r"(.+?)\.modules_to_save\.(.+)")
_PARAMETER = re.compile(r"(.+)\.(weight|bias)")


def parse_key(key: str) -> tuple[TensorKey, ...]:
    """The possible readings of ``key``, the likeliest first; empty for a name that no adapter has.

    Only inside ``modules_to_save`` there can be several: the segment after it may be an adapter's
    name or a child of the saved module.
    """
    for pattern, role in _PATTERNS:
        if match := pattern.fullmatch(key):
            return (TensorKey(match[1], role),)
    if match := _SAVED.fullmatch(key):
        parts = match[2].split(".")
        readings = [".".join([match[1], *parts[skip:]]) for skip in range(len(parts))]
    else:
        readings = [re.sub(r"\.(base_layer|original_module)\.(?=weight$|bias$)", ".", key)]
    found = (_PARAMETER.fullmatch(reading) for reading in readings)
    return tuple(TensorKey(match[1], "parameter", match[2]) for match in found if match)
