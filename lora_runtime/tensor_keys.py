"""What a tensor's name in an adapter file means, whatever PEFT version, wrapper or adapter name wrote it."""

from __future__ import annotations

from typing import Literal, NamedTuple

Role = Literal[
    "a", "b", "b_bias", "embedding_a", "embedding_b", "tokens", "magnitude", "method", "parameter", "original"
]

MAX_ADAPTER_NAMES = 3
"""How many adapter names in a row are taken for such: ``default.default.`` is known from the wild."""


class TensorKey(NamedTuple):
    """``module`` as spelled in the file, wrappers included; ``parameter`` for roles "parameter", "original" and
    "method" (a tensor of a PEFT method other than LoRA: what PEFT calls it inside the module).

    "original" is the base's own parameter that PEFT writes beside a saved one for ``bias="all"``.
    """

    module: str
    role: Role
    parameter: str = ""


_MARKERS: dict[tuple[str, str], Role] = {
    ("lora_A", "weight"): "a",
    ("lora_B", "weight"): "b",
    ("lora_B", "bias"): "b_bias",
    ("lora_embedding_A", ""): "embedding_a",
    ("lora_embedding_B", ""): "embedding_b",
    ("trainable_tokens_delta", ""): "tokens",
    ("lora_magnitude_vector", ""): "magnitude",
    ("lora_magnitude_vector", "weight"): "magnitude",
}
_MARKER_NAMES = frozenset(marker for marker, _ in _MARKERS)
_PARAMETERS = ("weight", "bias")
_INNER = frozenset({"base_layer", "token_adapter"})


def parse_key(key: str) -> tuple[TensorKey, ...]:
    """The possible readings of ``key``; empty for a name that no adapter has.

    Only inside ``modules_to_save`` there can be several: the segment after it may be an adapter's
    name or a child of the saved module. Which one exists is for the base to say.
    """
    parts = key.split(".")
    at = next((i for i, part in enumerate(parts) if part in _MARKER_NAMES), None)
    if at is None:
        role: Role | None = "original" if "original_module" in parts else "parameter"
        parameter, module = parts[-1], parts[:-1]
        role = role if parameter in _PARAMETERS else None
    else:
        role, parameter, module = _marked_role(parts[at], parts[at + 1 :]), "", parts[:at]
    if role is None:
        return ()
    return tuple(TensorKey(".".join(reading), role, parameter) for reading in _modules(module) if reading)


def parse_method_key(key: str, prefix: str) -> tuple[TensorKey, ...]:
    """The reading of a ``key`` whose tensor belongs to the PEFT method with ``prefix``; empty for any other."""
    parts = key.split(".")
    at = next((i for i, part in enumerate(parts) if part.startswith(prefix)), None)
    if not at:
        return ()
    module = [part for part in parts[:at] if part not in _INNER]
    name = [parts[at], *(part for part in parts[at + 1 :] if part != "default")]
    return (TensorKey(".".join(module), "method", ".".join(name)),)


def _marked_role(marker: str, rest: list[str]) -> Role | None:
    """The role by what ends the key; between marker and end there may be adapter names."""
    last = rest[-1] if rest else ""
    names = rest[:-1] if (marker, last) in _MARKERS else rest
    if len(names) > MAX_ADAPTER_NAMES:
        return None
    return _MARKERS.get((marker, last)) or _MARKERS.get((marker, ""))


def _modules(parts: list[str]) -> list[list[str]]:
    parts = [part for part in parts if part not in _INNER]
    if "original_module" in parts:
        return [[part for part in parts if part != "original_module"]]
    if "modules_to_save" not in parts:
        return [parts]
    at = parts.index("modules_to_save")
    outer, inner = parts[:at], parts[at + 1 :]
    return [outer + inner[skip:] for skip in range(min(len(inner), MAX_ADAPTER_NAMES) + 1)]
