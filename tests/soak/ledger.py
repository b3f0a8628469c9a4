"""What was acknowledged, so what must be there at the end; and what a model name may mean at any moment."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf

Meaning = str | None
"""A target of ``world.TARGETS``; None where there is nothing under the name."""
KEPT_S = 120.0


class Meanings:
    """What each spelling of a model means. While a change is under way it may mean the old and the new."""

    def __init__(self) -> None:
        self._history: dict[str, list[tuple[float, frozenset[Meaning]]]] = {}

    def names(self) -> list[str]:
        """Spellings that mean something now."""
        return [name for name, history in self._history.items() if history[-1][1] != {None}]

    @contextmanager
    def changing(self, to: dict[str, Meaning]) -> Iterator[None]:
        """A change is sent in this context, and acknowledged where it ends without an error."""
        for name, meaning in to.items():
            self._note(name, self._now(name) | {meaning})
        yield
        for name, meaning in to.items():
            self._note(name, frozenset({meaning}))

    def allowed(self, name: str, since: float, until: float) -> set[Meaning]:
        """All that ``name`` may have meant in that time, of ``time.monotonic()``."""
        history = self._history.get(name, [(0.0, frozenset[Meaning]({None}))])
        found: set[Meaning] = set()
        for number, (begun, meanings) in enumerate(history):
            ended = history[number + 1][0] if number + 1 < len(history) else inf
            if begun <= until and since < ended:
                found |= meanings
        return found

    def last_change(self, name: str) -> float:
        """When it began to mean what it means now, of ``time.monotonic()``."""
        return self._history[name][-1][0]

    def _now(self, name: str) -> frozenset[Meaning]:
        return self._history[name][-1][1] if name in self._history else frozenset({None})

    def _note(self, name: str, meanings: frozenset[Meaning]) -> None:
        now = time.monotonic()
        history = self._history.setdefault(name, [(0.0, frozenset({None}))])
        history.append((now, meanings))
        while len(history) > 2 and history[1][0] < now - KEPT_S:
            history.pop(0)


@dataclass(slots=True)
class Held:
    """An adapter as the service acknowledged it: content by version, in order of registration; versions by alias."""

    versions: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Ledger:
    """Every acknowledged change. ``audit``: how many rows of each action and subject the audit must have."""

    meanings: Meanings = field(default_factory=Meanings)
    adapters: dict[str, Held] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    """Model aliases, and the targets that they mean."""
    audit: Counter[tuple[str, str]] = field(default_factory=Counter)
    keys: set[str] = field(default_factory=set)
    """Idempotency keys of changes that succeeded."""
    arms: dict[str, str] = field(default_factory=dict)
    """Users of the experiment whom a request of theirs showed their arm."""
    trials: dict[str, str | None] = field(default_factory=dict)
    """The experiment's requests that were answered in full, and their arms."""
    may_be_trials: set[str] = field(default_factory=set)
    """Requests whose clients left."""
    feedback: dict[str, float] = field(default_factory=dict)
