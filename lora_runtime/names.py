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
_MAX_SHOWN = 160


def tail(spelled: str) -> str:
    """``spelled`` without wrappers and without leading containers: what all spellings have in common."""
    parts = [part for part in spelled.split(".") if part not in _WRAPPERS]
    start = 0
    while start < len(parts) - 1 and parts[start] in _LEADING:
        start += 1
    return ".".join(parts[start:])


def unwrapped(spelled: str) -> str:
    """``spelled`` as the trained model itself named it: without wrappers and PEFT's ``base_model.model.``"""
    parts = [part for part in spelled.split(".") if part not in _WRAPPERS]
    start = 1 if parts[0] == "module" else 0
    while parts[start : start + 2] == ["base_model", "model"]:
        start += 2
    return ".".join(parts[start:])


def canonical(spelled: str) -> str:
    """The canonical name that ``spelled`` would have; whether the base has it is another question."""
    rest = tail(spelled)
    if rest == "lm_head":
        return rest
    if rest == "visual" or rest.startswith("visual."):
        return f"model.{rest}"
    return f"model.language_model.{rest}"


def place_of(key: str) -> tuple[str, str]:
    """The canonical leaf and the parameter that a checkpoint's tensor ``key`` is."""
    module, _, parameter = key.rpartition(".")
    return canonical(module), parameter


def spellings(name: str) -> tuple[str, ...]:
    """The names under which training code may have known the canonical ``name``, always in this order:

    since transformers 4.52; before it; since it, trained on the model without its ``lm_head``; and before it, so.
    """
    if name.startswith("model.visual"):
        bare = name.removeprefix("model.")
        return name, bare, bare, bare
    if name.startswith("model.language_model"):
        rest = name.removeprefix("model.language_model").removeprefix(".")
        return name, f"model.{rest}".rstrip("."), name.removeprefix("model."), rest
    return name, name, name, name


NUM_SPELLINGS = 4


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names closest to ``name``, best first."""
    return difflib.get_close_matches(name[:_MAX_SHOWN], list(known), n=count, cutoff=0.4)


def shown(name: str) -> str:
    """``name`` as a message may carry it: names in a file can be of any length."""
    return name if len(name) <= _MAX_SHOWN else f"{name[:_MAX_SHOWN]}…"


def listed(names: Iterable[str], count: int = 8) -> str:
    """The first ``count`` names for a message, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(shown(name) for name in names[:count]) + more
