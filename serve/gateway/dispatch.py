"""One request's way through an experiment: which target it gets, what its answer says of that, what is written down.

A request for a plain model goes the same way; nothing is written of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime

from fastapi import Request

from lora_runtime.engine.protocol import Usage
from lora_runtime.errors import AdapterRejected, InvalidRequest, LoomError, NotFound, StoreUnavailable, VersionDamaged
from serve.assigner import Assigned
from serve.experiments.assignment import (
    FORCE_HEADER,
    MAX_UNIT_LENGTH,
    Kind,
    Subject,
    language_of,
    unit_of,
)
from serve.experiments.definition import NAME_PATTERN
from serve.experiments.events import Exposure, Outcome, Trial
from serve.experiments.recorder import Recorder
from serve.identity import Identity, Scope
from serve.schemas.common import TargetedBody
from serve.targets import Target

FALLS_BACK = (NotFound, AdapterRejected, StoreUnavailable, VersionDamaged)
"""Errors that are an arm's own: its adapter is gone, broken or out of reach. Others would meet any arm."""


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
    _ended: list[tuple[int, float | None, float | None, Usage]] = field(default_factory=list, init=False)

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
        if self.assigned is None or self.assigned.arm is None or not isinstance(error, FALLS_BACK):
            return False
        if self._kind is Kind.FORCED or failed == self.assigned.default:
            return False
        self.target, self._kind = self.assigned.default, Kind.FALLBACK
        return True

    def answering(self) -> bool:
        """Its answer begins, or will not: from here on feedback may come. True once, and only in an experiment."""
        assigned = self.assigned
        if self.recorder is None or assigned is None or assigned.experiment is None or self._is_written:
            return False
        self._is_written = True
        self.recorder.note(
            Trial(
                request_id=self.request_id,
                experiment=assigned.experiment.id,
                phase=assigned.experiment.phase.number,
                arm=assigned.arm,
                unit=assigned.unit,
                assignment=self._kind or assigned.kind,
                counts=assigned.counts,
                owner=self.owner,
                at=datetime.now(UTC),
            )
        )
        return True

    def ended(self, status: int, first_s: float | None, decoding_s: float, usage: Usage) -> None:
        """One of its parts is over; ``decoding_s`` from the first token to the last."""
        if self.recorder is None or self.assigned is None or self.assigned.experiment is None:
            return
        self.answering()
        token_s = decoding_s / (usage.completion_tokens - 1) if usage.completion_tokens > 1 else None
        self._ended.append((status, first_s, token_s, usage))
        if len(self._ended) == self.parts:
            self.recorder.note(self._outcome())

    def _outcome(self) -> Outcome:
        """Of all parts: the worst status, the longest wait, the mean time of a token."""
        firsts = [first for _, first, _, _ in self._ended if first is not None]
        tokens = [token for _, _, token, _ in self._ended if token is not None]
        return Outcome(
            request_id=self.request_id,
            status=max(status for status, _, _, _ in self._ended),
            is_cold=any(usage.was_cold for _, _, _, usage in self._ended),
            first_s=max(firsts, default=None),
            token_s=sum(tokens) / len(tokens) if tokens else None,
            prompt_tokens=sum(usage.prompt_tokens for _, _, _, usage in self._ended),
            completion_tokens=sum(usage.completion_tokens for _, _, _, usage in self._ended),
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
