"""One request's way through an experiment: which target it gets, what its answer says of that, what is written down.

A request for a plain model goes the same way; nothing is written of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime

from fastapi import Request

from lora_runtime.engine.protocol import Usage
from lora_runtime.errors import InvalidRequest, LoomError
from serve.assigner import Assigned
from serve.experiments.assignment import (
    FORCE_HEADER,
    MAX_UNIT_LENGTH,
    Kind,
    Subject,
    language_of,
    unit_of,
)
from serve.experiments.blame import BROKEN, UNFIT, Blame, blame_of
from serve.experiments.definition import NAME_PATTERN
from serve.experiments.effects import FAULT
from serve.experiments.events import Exposure, Outcome, Trial
from serve.experiments.recorder import Recorder
from serve.identity import Identity, Scope
from serve.schemas.common import TargetedBody
from serve.targets import Target


@dataclass(frozen=True, slots=True)
class _Part:
    """How one part of an answer ended; ``blame`` is None where it was answered."""

    status: int
    blame: Blame | None
    first_s: float | None
    token_s: float | None
    usage: Usage


@dataclass(slots=True)
class Dispatch:
    """A request on its way. ``target`` is what serves it now; ``parts`` calls of an engine make up its answer."""

    request_id: str
    owner: str
    target: Target
    assigned: Assigned | None = None
    recorder: Recorder | None = None
    parts: int = 1
    _kind: Kind | None = field(default=None, init=False)
    _is_written: bool = field(default=False, init=False)
    _arms_error: LoomError | None = field(default=None, init=False)
    _ended: list[_Part] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.assigned is not None:
            self._kind = self.assigned.kind

    @property
    def headers(self) -> dict[str, str]:
        """What the answer says of its target and, in an experiment, of its arm."""
        headers = {"X-Model-Served": self.target.served}
        if self.assigned is None or self.assigned.experiment is None:
            return headers
        experiment = self.assigned.experiment
        headers["X-Experiment"] = experiment.plan.name
        headers["X-Experiment-Phase"] = str(experiment.phase.number)
        headers["X-Assignment"] = str(self._kind)
        if self.assigned.arm is not None:
            headers["X-Variant"] = self.assigned.arm
        return headers

    @property
    def variant(self) -> tuple[str, str, str] | None:
        """Experiment, arm and kind, for metrics."""
        if self.assigned is None or self.assigned.experiment is None:
            return None
        return self.assigned.experiment.plan.name, self.assigned.arm or "", str(self._kind)

    def dispatched(self) -> None:
        """It is sent to an engine: the unit is exposed to its arm, whatever comes of it."""
        assigned = self.assigned
        if self.recorder is None or assigned is None or assigned.experiment is None:
            return
        if assigned.counts and assigned.unit is not None and assigned.arm is not None:
            self.recorder.note(
                Exposure(
                    experiment=assigned.experiment.id,
                    phase=assigned.experiment.phase.number,
                    unit=assigned.unit,
                    arm=assigned.arm,
                    request_id=self.request_id,
                    at=datetime.now(UTC),
                )
            )

    def falls_back(self, error: LoomError, failed: Target) -> bool:
        """Whether another try is due, with what the alias means, since ``failed`` cannot serve."""
        if self.assigned is None or self.assigned.arm is None or not isinstance(error, BROKEN + UNFIT):
            return False
        if self._kind is Kind.FORCED or failed == self.assigned.default:
            return False
        self.target, self._kind, self._arms_error = self.assigned.default, Kind.FALLBACK, error
        return True

    def blame(self, error: LoomError | None, *, never_ends: bool = False) -> Blame:
        """Whose fault it is that the answer failed with ``error``, as :func:`blame_of` has it."""
        is_default = self.assigned is not None and self.target == self.assigned.default
        return blame_of(error, is_default=is_default, arms_error=self._arms_error, never_ends=never_ends)

    def answering(self, blame: Blame | None = None) -> bool:
        """Its answer begins, or will not, by whose fault ``blame`` says: from here on feedback may come. True once, and
        only in an experiment."""
        assigned = self.assigned
        if self.recorder is None or assigned is None or assigned.experiment is None or self._is_written:
            return False
        self._is_written = True
        tells = blame not in (Blame.REQUEST, Blame.LOAD)
        self.recorder.note(
            Trial(
                request_id=self.request_id,
                experiment=assigned.experiment.id,
                phase=assigned.experiment.phase.number,
                arm=assigned.arm,
                unit=assigned.unit,
                assignment=(self._kind or assigned.kind) if tells or not assigned.counts else Kind.UNANSWERED,
                counts=assigned.counts and tells,
                owner=self.owner,
                at=datetime.now(UTC),
            )
        )
        return True

    def ended(
        self, status: int, first_s: float | None, decoding_s: float, usage: Usage, blame: Blame | None = None
    ) -> None:
        """One of its parts is over, answered or failed by whose fault ``blame`` says; ``decoding_s`` from the first
        token to the last."""
        if self.recorder is None or self.assigned is None or self.assigned.experiment is None:
            return
        self.answering(blame)
        token_s = decoding_s / (usage.completion_tokens - 1) if usage.completion_tokens > 1 else None
        self._ended.append(_Part(status, blame, first_s, token_s, usage))
        if len(self._ended) == self.parts and (outcome := self._outcome()) is not None:
            self.recorder.note(outcome)

    def _outcome(self) -> Outcome | None:
        """Of all parts: the worst status, the longest wait, the mean time of a token. None where they failed, and that
        says nothing of the arm."""
        blames = {part.blame for part in self._ended}
        is_fault = Blame.ARM in blames
        if not is_fault and blames != {None}:
            return None
        status = max(part.status for part in self._ended)
        tokens = [part.token_s for part in self._ended if part.token_s is not None]
        return Outcome(
            request_id=self.request_id,
            status=max(status, FAULT) if is_fault else status,
            is_cold=any(part.usage.was_cold for part in self._ended),
            first_s=max((part.first_s for part in self._ended if part.first_s is not None), default=None),
            token_s=sum(tokens) / len(tokens) if tokens else None,
            prompt_tokens=sum(part.usage.prompt_tokens for part in self._ended),
            completion_tokens=sum(part.usage.completion_tokens for part in self._ended),
        )


def forced_variant(request: Request, identity: Identity) -> str | None:
    """The arm that a request asks for by name. Raises InvalidRequest, and Forbidden without the scope for it."""
    name = request.headers.get(FORCE_HEADER)
    if name is None:
        return None
    identity.check(Scope.EXPERIMENTS)
    if not re.fullmatch(NAME_PATTERN, name):
        raise InvalidRequest("X-Force-Variant must be an arm's name.", param="X-Force-Variant")
    return name


def subject_of(body: TargetedBody, request: Request, identity: Identity) -> Subject:
    """What assignment may know of a request. Raises InvalidRequest for a unit that is too long."""
    headers, metadata = request.headers, body.metadata or {}
    unit = unit_of(headers, metadata, body.safety_identifier, body.user)
    if unit is not None and len(unit) > MAX_UNIT_LENGTH:
        raise InvalidRequest(f"The experiment's unit is longer than {MAX_UNIT_LENGTH} characters.", param="user")
    return Subject(
        unit=unit,
        request_id=request.state.request_id,
        tenant=tuple(text for text in (identity.id, identity.name) if text),
        has_image=body.has_images,
        language=metadata.get("language") or language_of(headers.get("accept-language", "")),
        headers=headers,
        metadata=metadata,
    )
