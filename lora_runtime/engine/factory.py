"""Engines by name. Imports an engine only when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

from lora_runtime.engine.protocol import Engine

KINDS = ("auto", "embedded", "vllm", "fake")


def create_engine(kind: str, options: Mapping[str, Any]) -> Engine:
    """An engine that is not started yet. Raises ValueError naming an unknown kind or option.

    "auto" is vLLM where it is installed, else the embedded engine.
    """
    if kind == "auto":
        kind = "embedded" if find_spec("vllm") is None else "vllm"
    if kind == "vllm":
        from lora_runtime.engine.vllm.config import VllmConfig
        from lora_runtime.engine.vllm.engine import VllmEngine

        return VllmEngine(VllmConfig(**_checked(kind, options, VllmConfig)))
    if kind == "embedded":
        from lora_runtime.engine.embedded.config import EmbeddedConfig
        from lora_runtime.engine.embedded.engine import EmbeddedEngine

        return EmbeddedEngine(EmbeddedConfig(**_checked(kind, options, EmbeddedConfig)))
    if kind == "fake":
        from lora_runtime.engine.fake import FakeConfig, FakeEngine

        return FakeEngine(FakeConfig(**_checked(kind, options, FakeConfig)))
    raise ValueError(f"There is no engine '{kind}'; choose one of {', '.join(KINDS)}.")


def _checked(kind: str, options: Mapping[str, Any], config: type) -> dict[str, Any]:
    known = {field.name for field in fields(config)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"Engine '{kind}' has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
    return dict(options)
