"""What came of a soak's requests: counts and times by activity, and every finding."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

KINDS = ("wrong", "lost", "hung", "failed")
"""``wrong``: an answer that is not the right one. ``lost``: an acknowledged change that is not there. ``hung``: no
answer by the deadline. ``failed``: a status, or a broken connection, that was not due."""


@dataclass(slots=True)
class Tally:
    """Counted as it happens; used from one event loop."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    left: Counter[str] = field(default_factory=Counter)
    found: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))

    @contextmanager
    def timed(self, activity: str) -> Iterator[None]:
        """Counts what is done in it, with its time, unless it raises."""
        begun = time.monotonic()
        yield
        self.seconds[activity].append(time.monotonic() - begun)

    def leave(self, activity: str) -> None:
        """A client left on purpose, before its answer's end."""
        self.left[activity] += 1

    def find(self, kind: str, activity: str, what: str) -> None:
        """Something is not as it should be; ``kind`` is one of KINDS."""
        self.found[kind, activity] += 1
        if len(self.examples[kind, activity]) < 5:
            self.examples[kind, activity].append(what)

    @property
    def num_found(self) -> int:
        return self.found.total()

    def table(self) -> str:
        head = f"{'activity':<18}{'done':>7}{'left':>6}{'p50 s':>8}{'p99 s':>8}{'max s':>8}"
        lines = [head + "".join(f"{kind:>8}" for kind in KINDS)]
        for activity in sorted({*self.seconds, *self.left, *(name for _, name in self.found)}):
            times = sorted(self.seconds[activity]) or [0.0]
            row = f"{activity:<18}{len(self.seconds[activity]):>7}{self.left[activity]:>6}"
            row += "".join(f"{times[min(len(times) - 1, int(len(times) * q))]:>8.2f}" for q in (0.5, 0.99, 1.0))
            lines.append(row + "".join(f"{self.found[kind, activity]:>8}" for kind in KINDS))
        totals = {kind: sum(n for (k, _), n in self.found.items() if k == kind) for kind in KINDS}
        done, left = sum(map(len, self.seconds.values())), self.left.total()
        lines.append(f"{'all':<18}{done:>7}{left:>6}{'':>24}" + "".join(f"{totals[kind]:>8}" for kind in KINDS))
        for (kind, activity), examples in sorted(self.examples.items()):
            lines += [f"{kind}, {activity}: {example}" for example in examples]
        return "\n".join(lines)
