"""Power sums of units' values: all that a mean, its variance, skew and kurtosis need of any number of units.

A unit has y (an outcome) and x (what it is measured over; 1 for a mean over units); r = Σy / Σx. With a centre c near
r,

    e = y − c·x,        S_ij = Σ eⁱ·xʲ        for 1 ≤ i + j ≤ 4.

Residuals d = y − r·x = e − δ·x, where δ = r − c = S_10 / S_01, have the power sums

    Σdᵏ = Σ_m binom(k, m)·(−δ)ᵐ·S_{k−m, m}.

Sums of squares of y itself lose the variance of values that are large beside their spread (1e8 ± 0.1) to cancellation;
those of e do not (Chan, Golub & LeVeque, Am. Stat. 37(3), 1983, on shifted data).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

ORDERS = tuple((total - j, j) for total in range(1, 5) for j in range(total + 1))
"""(i, j) of each of :attr:`Moments.sums`: (1,0), (0,1), (2,0), (1,1), (0,2), … (0,4)."""
PLACES = {order: place for place, order in enumerate(ORDERS)}
NOISE = 2.0**-46
"""Residuals whose root mean square is below this part of y's are rounding (2⁻⁵² of y at most, in y and in c·x), not
spread: a value that is always 0.1 has none."""


class Residuals(NamedTuple):
    """Σd², Σd³ and Σd⁴ of d = y − r·x over units."""

    square: float
    cube: float
    fourth: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Power sums over ``n`` units, those with x > 0, in the order of :data:`ORDERS`.

    ``is_binary``: every y counts successes among the unit's x.
    """

    n: int = 0
    centre: float = 0.0
    sums: tuple[float, ...] = (0.0,) * len(ORDERS)
    is_binary: bool = False

    @classmethod
    def of(
        cls,
        y: Sequence[float] | Floats,
        x: Sequence[float] | Floats,
        *,
        centre: float | None = None,
        is_binary: bool = False,
    ) -> Moments:
        """Of units' y and x, both of shape (units,); ``centre`` is Σy / Σx where none is given. Each sum is rounded
        once."""
        ys, xs = np.asarray(y, np.float64), np.asarray(x, np.float64)
        ys, xs = ys[xs > 0], xs[xs > 0]
        if not xs.size:
            return cls(centre=centre or 0.0, is_binary=is_binary)
        if centre is None:
            centre = math.fsum(ys.tolist()) / math.fsum(xs.tolist())
        sums = tuple(math.fsum(term) for term in terms(centre, ys, xs).tolist())
        return cls(n=int(xs.size), centre=centre, sums=sums, is_binary=is_binary)

    def __add__(self, other: Moments) -> Moments:
        """Of both together. Their centres must be equal: see :meth:`recentred`."""
        if not other.n:
            return self
        if not self.n:
            return other
        assert self.centre == other.centre, "moments around different centres do not add"
        sums = tuple(a + b for a, b in zip(self.sums, other.sums, strict=True))
        is_binary = self.is_binary and other.is_binary
        return Moments(n=self.n + other.n, centre=self.centre, sums=sums, is_binary=is_binary)

    def recentred(self, centre: float) -> Moments:
        """The same around another centre c′: e′ = e + (c − c′)·x, expanded. Far from r, precision is lost."""
        shift = self.centre - centre
        if not shift:
            return self
        return Moments(
            n=self.n,
            centre=centre,
            sums=tuple(self._shifted(i, j, shift) for i, j in ORDERS),
            is_binary=self.is_binary,
        )

    def power(self, i: int, j: int) -> float:
        """Σ eⁱ·xʲ, of a total order of at most 4."""
        return self.sums[PLACES[i, j]] if i + j else float(self.n)

    def square_around(self, ratio: float) -> float:
        """Σ (y − ratio·x)²."""
        return max(0.0, self._shifted(2, 0, self.centre - ratio))

    @property
    def y(self) -> float:
        """Σy."""
        return math.fsum((self.power(1, 0), self.centre * self.power(0, 1)))

    @property
    def x(self) -> float:
        """Σx."""
        return self.power(0, 1)

    @property
    def mean(self) -> float | None:
        """r = Σy / Σx; None without units."""
        return self.centre + self.power(1, 0) / self.x if self.x else None

    @property
    def residuals(self) -> Residuals:
        """Around the mean: Σd² and Σd⁴ are never negative, and all are 0 where no spread is left above rounding."""
        if not self.x:
            return Residuals(0.0, 0.0, 0.0)
        shift = -self.power(1, 0) / self.x
        square, cube, fourth = (self._shifted(order, 0, shift) for order in (2, 3, 4))
        if square <= NOISE * NOISE * self._square_of_y():
            return Residuals(0.0, 0.0, 0.0)
        return Residuals(square, cube, max(fourth, square * square / self.n))

    def _shifted(self, i: int, j: int, shift: float) -> float:
        """Σ (e + shift·x)ⁱ·xʲ."""
        return math.fsum(math.comb(i, m) * shift**m * self.power(i - m, j + m) for m in range(i + 1))

    def _square_of_y(self) -> float:
        """Σy²."""
        return max(0.0, self._shifted(2, 0, self.centre))


def terms(centre: float, y: Floats, x: Floats) -> Floats:
    """eⁱ·xʲ of the units that are there (x > 0), of shape (14, units), in the order of :data:`ORDERS`. Multiplied in
    one order always, so that equal units have equal terms."""
    is_there = x > 0
    y, x = y[is_there], x[is_there]
    e = y - centre * x
    e2, x2, one = e * e, x * x, np.ones_like(x)
    e_powers, x_powers = (one, e, e2, e2 * e, e2 * e2), (one, x, x2, x2 * x, x2 * x2)
    return np.stack([e_powers[i] * x_powers[j] for i, j in ORDERS])
