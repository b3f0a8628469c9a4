"""What an examination says of an adapter, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing found. ``code`` is stable, for machines; ``advice`` says what to do.

    Errors are what serving refuses. Warnings are what serves here and fails, or does nothing, elsewhere.
    """

    code: str
    severity: Severity
    message: str
    advice: str = ""
    modules: tuple[str, ...] = ()
