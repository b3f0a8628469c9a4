"""Who gets which arm: a pure function of the experiment, its phase and the unit. No state, no I/O, no clock.

    h(salt, unit) = (top 52 bits of BLAKE2b-64(utf8(salt) ‖ 0x00 ‖ utf8(unit)) + ½) / 2⁵²,  in (0, 1)

    in the layer   start ≤ h("layer/" + layer, unit) < end
    enrolled       h("gate/" + id + "/" + draw, unit) < coverage
    arm            the one of largest  -weight / ln h("arm/" + id + "/" + draw + "/" + arm, unit)

Three salts: with one for the gate and the arm, whoever a 20 % gate lets in would all get the first arm. More coverage
lets more units in and moves nobody. Weighted rendezvous hashing (Thaler & Ravishankar, IEEE/ACM ToN 6(1) 1998, with
the weighting of Schindelhauer & Schomaker, SPAA 2005) moves nobody between arms that stay when an arm comes or goes.
``id`` is never the name, and ``draw`` the number of the phase that units were drawn in. Vectors for other
implementations are in ``vectors.json`` beside this file.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from serve.experiments.definition import Condition

UNIT_HEADER = "x-experiment-unit"
UNIT_FIELD = "experiment_unit"
SESSION_HEADER = "x-session-id"
FORCE_HEADER = "x-force-variant"
MAX_UNIT_LENGTH = 512
_SCALE = 1.0 / (1 << 52)


class Kind(StrEnum):
    """How a request came to its arm; ``X-Assignment`` says it."""

    HASH = "hash"
    FORCED = "forced"
    FALLBACK = "fallback"
    NOT_ENROLLED = "not_enrolled"
    REQUEST = "request"
    UNANSWERED = "unanswered"
    """As it is kept, not said: one that failed before its answer began, and not by the fault of its arm."""


class Named(Protocol):
    """An arm, as far as drawing needs to know it."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What assignment may know of a request. ``tenant``: the API key's id and name; names of headers are in lower
    case."""

    unit: str | None
    request_id: str
    tenant: tuple[str, ...] = ()
    has_image: bool = False
    language: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def values(self, attribute: str) -> tuple[str, ...]:
        """What the request says of an attribute of conditions; nothing, where it says nothing."""
        source, _, name = attribute.partition(".")
        match source:
            case "tenant":
                return self.tenant
            case "has_image":
                return ("true" if self.has_image else "false",)
            case "language":
                return (self.language,) if self.language else ()
            case "header":
                found = self.headers.get(name.lower())
            case _:
                found = self.metadata.get(name)
        return () if found is None else (found,)


def uniform(salt: str, unit: str) -> float:
    """h(salt, unit) as above."""
    return _uniform(_salted(salt), unit.encode())


class Draw:
    """One phase's draw with its salts made ready. ``layer``: its name and the part of it that is the experiment's."""

    def __init__(
        self,
        experiment: str,
        number: int,
        *,
        arms: Sequence[Named],
        coverage: float,
        conditions: Sequence[Condition] = (),
        layer: tuple[str, float, float] | None = None,
    ) -> None:
        self._coverage = coverage
        self._conditions = tuple(conditions)
        self._layer = None if layer is None else (_salted(f"layer/{layer[0]}"), layer[1], layer[2])
        self._gate = _salted(f"gate/{experiment}/{number}")
        self._arms = tuple(
            (arm.name, arm.weight, _salted(f"arm/{experiment}/{number}/{arm.name}")) for arm in arms if arm.weight > 0
        )

    def arm(self, subject: Subject) -> str | None:
        """The arm's name, None for who is not enrolled. Without a unit, the request is one of its own."""
        if not all(_meets(subject, condition) for condition in self._conditions):
            return None
        return self.arm_of(subject.request_id if subject.unit is None else subject.unit)

    def arm_of(self, unit: str) -> str | None:
        """As :meth:`arm`, of a unit whose request meets the conditions."""
        key = unit.encode()
        if self._layer is not None:
            salt, start, end = self._layer
            if not start <= _uniform(salt, key) < end:
                return None
        if _uniform(self._gate, key) >= self._coverage:
            return None
        best, best_score = None, -1.0
        for name, weight, salt in self._arms:
            score = -weight / math.log(_uniform(salt, key))
            if score > best_score:
                best, best_score = name, score
        return best


def unit_of(
    headers: Mapping[str, str], metadata: Mapping[str, str], safety_identifier: str | None, user: str | None
) -> str | None:
    """Whom a request is of, by the first that says so; None where nothing does.

    Text that came in a header is read as UTF-8 and all of it is made :func:`normal`, so that one unit is one unit
    whichever way it is named.
    """
    named = (
        _text(headers.get(UNIT_HEADER)),
        metadata.get(UNIT_FIELD),
        safety_identifier,
        user,
        _text(headers.get(SESSION_HEADER)),
    )
    return next((unit for given in named if given and (unit := normal(given))), None)


def normal(unit: str) -> str:
    """The one spelling of a unit: Unicode's NFC, without white space around it. Case is kept: ids may differ in it."""
    return unicodedata.normalize("NFC", unit).strip()


def unit_digest(experiment: str, unit: str, secret: str = "") -> str:
    """What is stored of a unit: 32 hex digits that differ between experiments, keyed where there is a secret."""
    key = hashlib.blake2b(secret.encode(), digest_size=32).digest()
    return hashlib.blake2b(f"{experiment}/{unit}".encode(), digest_size=16, key=key).hexdigest()


def language_of(accept_language: str) -> str:
    """The primary language that a request asks for first: ``de`` of ``de-CH,de;q=0.9``."""
    first = accept_language.split(",", 1)[0].split(";", 1)[0].strip()
    primary = first.split("-", 1)[0].lower()
    return primary if primary.isalpha() and len(primary) <= 8 else ""


def _meets(subject: Subject, condition: Condition) -> bool:
    values = subject.values(condition.attribute)
    if condition.any_of:
        return any(value in condition.any_of for value in values)
    return not any(value in condition.none_of for value in values)


def _text(header: str | None) -> str | None:
    """Headers arrive decoded as Latin-1."""
    if header is None:
        return None
    try:
        return header.encode("latin-1").decode()
    except UnicodeError:
        return header


def _salted(salt: str) -> hashlib.blake2b:
    return hashlib.blake2b(salt.encode() + b"\0", digest_size=8)


def _uniform(salt: hashlib.blake2b, key: bytes) -> float:
    digest = salt.copy()
    digest.update(key)
    return ((int.from_bytes(digest.digest(), "big") >> 12) + 0.5) * _SCALE
