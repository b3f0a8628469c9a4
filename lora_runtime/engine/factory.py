"""Engines by name, and who examines adapters for them. Imports an engine only when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

from lora_runtime.engine.protocol import Engine, Examiner

KINDS = ("auto", "embedded", "vllm", "fake")


def create_engine(kind: str, options: Mapping[str, Any]) -> Engine:
    """An engine that is not started yet. Raises ValueError naming an unknown kind or option.

    "auto" is vLLM where it is installed, else the embedded engine.
    """
    kind, config = _configured(kind, options)
    if kind == "vllm":
        from lora_runtime.engine.vllm.engine import VllmEngine

        return VllmEngine(config)
    if kind == "embedded":
        from lora_runtime.engine.embedded.engine import EmbeddedEngine

        return EmbeddedEngine(config)
    from lora_runtime.engine.fake import FakeEngine

    return FakeEngine(config)


def create_examiner(kind: str, options: Mapping[str, Any]) -> Examiner:
    """Examines adapters as :func:`create_engine`'s engine would, without one: it needs no model in memory.

    Raises ValueError likewise.
    """
    kind, config = _configured(kind, options)
    if kind == "fake":
        return create_engine(kind, options)
    from lora_runtime.engine.entry import AdapterReader, ThreadedExaminer, dtype_named
    from lora_runtime.layout import BaseLayout

    layout = BaseLayout.from_config(config.base_path)
    return ThreadedExaminer(
        AdapterReader(layout, config.base_path, config.max_materialised_bytes, dtype_named(config.known_dtype))
    )


def _configured(kind: str, options: Mapping[str, Any]) -> tuple[str, Any]:
    """The kind that "auto" stands for, and that engine's own configuration. Imports no engine but the fake one."""
    if kind == "auto":
        kind = "embedded" if find_spec("vllm") is None else "vllm"
    if kind == "vllm":
        from lora_runtime.engine.vllm.config import VllmConfig

        return kind, VllmConfig(**_checked(kind, options, VllmConfig))
    if kind == "embedded":
        from lora_runtime.engine.embedded.config import EmbeddedConfig

        return kind, EmbeddedConfig(**_checked(kind, options, EmbeddedConfig))
    if kind == "fake":
        from lora_runtime.engine.fake import FakeConfig

        return kind, FakeConfig(**_checked(kind, options, FakeConfig))
    raise ValueError(f"There is no engine '{kind}'; choose one of {', '.join(KINDS)}.")


def _checked(kind: str, options: Mapping[str, Any], config: type) -> dict[str, Any]:
    known = {field.name for field in fields(config)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"Engine '{kind}' has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
    return dict(options)
