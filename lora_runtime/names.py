"""Module names: one canonical spelling, and the spellings that checkpoints in the wild carry.

Canonical are the base's own paths in transformers >= 4.52: ``model.language_model.layers.0…``,
``model.visual.…``, ``lm_head``. Before that release they were ``model.layers.0…``, ``visual.…``.
Training wrappers add ``base_model.model.``, ``_orig_mod.``, ``module.`` and double parts of it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_LEADING = frozenset({"base_model", "model", "language_model", "module"})


def tail(spelled: str) -> str:
    """``spelled`` without wrappers and without leading containers: what all spellings have in common."""
    parts = [part for part in spelled.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] in _LEADING:
        parts.pop(0)
    return ".".join(parts)


def canonical(spelled: str) -> str:
    """The canonical name that ``spelled`` would have; whether the base has it is another question."""
    rest = tail(spelled)
    if rest == "lm_head":
        return rest
    if rest == "visual" or rest.startswith("visual."):
        return f"model.{rest}"
    return f"model.language_model.{rest}"


def spellings(name: str) -> tuple[str, ...]:
    """The names under which training code may have known the canonical ``name``: now, and before 4.52."""
    if name.startswith("model.visual"):
        return name, name.removeprefix("model.")
    if name.startswith("model.language_model"):
        return name, name.replace("model.language_model", "model", 1)
    return name, name


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names closest to ``name``, best first."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.4)
