"""What is seen of an experiment's requests, as it is written down. Plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime

from serve.experiments.assignment import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposure:
    """A unit that was given an arm, by the digest it is stored under."""

    experiment: str
    phase: int
    unit: str
    arm: str
    request_id: str
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A request that an experiment answered. ``counts``: whether it is evidence. ``owner``: the API key's id."""

    request_id: str
    experiment: str
    phase: int
    arm: str | None
    unit: str | None
    assignment: Kind
    counts: bool
    owner: str
    at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How such a request ended, where that says something of its arm: answered, or failed by the arm's fault, which is
    a ``status`` from 500 on whatever the client was told. Times in seconds, None where there was nothing to time."""

    request_id: str
    status: int
    is_cold: bool = False
    first_s: float | None = None
    token_s: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def ln_first_s(self) -> float | None:
        return _ln(self.first_s)

    @property
    def ln_token_s(self) -> float | None:
        return _ln(self.token_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One question's two answers: what the user got from ``served``, and what ``shadow`` would have said."""

    experiment: str
    phase: int
    request_id: str
    served: str
    shadow: str
    prompt: str | None
    answer: str
    shadow_answer: str
    at: datetime


Event = Exposure | Trial | Outcome | Pair


def _ln(seconds: float | None) -> float | None:
    return None if seconds is None or seconds <= 0 else math.log(seconds)
