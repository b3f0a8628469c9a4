"""Running power sums in whole numbers: units come and change in any order, and the sums are the same to the last bit.

Values are held in units of 2⁻⁸⁰, which is exact for every float of a size above 2⁻²⁸ (4e-9); smaller ones are rounded
to 8e-25. With Y = y·2⁸⁰ the sums Σ Yⁱ·xʲ are integers of Python's, so that nothing is rounded until they are read,
nothing drifts, and what is taken away again leaves no trace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from serve.experiments.moments import ORDERS, PLACES, Moments

BITS = 80
ONE = 1 << BITS


def fixed(value: float) -> int:
    """``value``, finite, in units of 2⁻⁸⁰."""
    return round(math.ldexp(value, BITS))


@dataclass(slots=True)
class PowerSums:
    """Σ Yⁱ·xʲ over ``n`` units, those with x > 0, in the order of :data:`~serve.experiments.moments.ORDERS`."""

    n: int = 0
    sums: list[int] = field(default_factory=lambda: [0] * len(ORDERS))

    def add(self, y: int, x: int, times: int = 1) -> None:
        """A unit whose y is ``y``·2⁻⁸⁰ and whose x is ``x``; of no effect without x. ``times`` -1 takes it away."""
        if x <= 0:
            return
        self.n += times
        y2, x2 = y * y, x * x
        y3, x3 = y2 * y, x2 * x
        powers = (y, x, y2, y * x, x2, y3, y2 * x, y * x2, x3, y3 * y, y3 * x, y2 * x2, y * x3, x3 * x)
        self.sums = [a + times * b for a, b in zip(self.sums, powers, strict=True)]

    def with_silent(self, everybody: PowerSums) -> PowerSums:
        """The same y, and the x of ``everybody``: who is not in here has y = 0 there."""
        pairs = zip(ORDERS, self.sums, everybody.sums, strict=True)
        return PowerSums(n=everybody.n, sums=[theirs if not i else mine for (i, _), mine, theirs in pairs])

    def moments(self, *, is_binary: bool = False) -> Moments:
        """Around the ratio Σy / Σx itself, each sum rounded once."""
        y, x = self.sums[PLACES[1, 0]], self.sums[PLACES[0, 1]]
        if not x:
            return Moments(is_binary=is_binary)
        centre = y / (x << BITS)
        shift = -fixed(centre)
        return Moments(
            n=self.n,
            centre=math.ldexp(-shift, -BITS),
            sums=tuple(self._shifted(i, j, shift) / (1 << BITS * i) for i, j in ORDERS),
            is_binary=is_binary,
        )

    def _shifted(self, i: int, j: int, shift: int) -> int:
        """Σ (Y + shift·x)ⁱ·xʲ."""
        return sum(math.comb(i, m) * shift**m * self._power(i - m, j + m) for m in range(i + 1))

    def _power(self, i: int, j: int) -> int:
        return self.sums[PLACES[i, j]]


def of_units(count: int) -> PowerSums:
    """Of ``count`` units with x = 1 and y = 0."""
    return PowerSums(n=count, sums=[0 if i else count for i, _ in ORDERS])
