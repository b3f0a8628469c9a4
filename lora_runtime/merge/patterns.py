"""Patterns of module names in a recipe: whether they match anything. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection
from fnmatch import fnmatchcase

from lora_runtime.merge.recipe import Input
from lora_runtime.names import listed, nearest, shown

_WILD = re.compile(r"[*?\[\]!]")


def unmatched(said: Input, known: Collection[str]) -> list[str]:
    """What to say of each pattern of an input that matches none of the ``known`` leaves and heads."""
    return [
        f"'{said.adapter}': no module of the base matches '{shown(part.modules)}'. {_suggested(part.modules, known)}"
        for part in said.by_modules
        if not any(fnmatchcase(name, part.modules) for name in known)
    ]


def idle(said: Input, changed: Collection[str]) -> list[str]:
    """The patterns of an input that decide about none of the modules ``changed`` by its adapter, in their order."""
    used = {
        next((part.modules for part in said.by_modules if fnmatchcase(name, part.modules)), None) for name in changed
    }
    return [part.modules for part in said.by_modules if part.modules not in used]


def _suggested(pattern: str, known: Collection[str]) -> str:
    """The pattern with its unknown parts replaced by the nearest known ones, or else the nearest ends of names."""
    words = {word for name in known for word in name.split(".")}
    parts = pattern.split(".")
    found = [part if _WILD.search(part) or part in words else next(iter(nearest(part, words)), part) for part in parts]
    if (spelled := ".".join(found)) != pattern and any(fnmatchcase(name, spelled) for name in known):
        return f"Nearest: '{shown(spelled)}'."
    if (tail := pattern.lstrip("*.")) and not _WILD.search(tail):
        ends = {".".join(name.split(".")[-tail.count(".") - 1 :]) for name in known}
        if close := nearest(tail, ends):
            return f"Nearest: {listed(map('*.{}'.format, close))}."
    return f"Modules are named like {listed(sorted(known)[:2])}."
