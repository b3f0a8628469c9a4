"""What a breached guardrail leads to."""

from __future__ import annotations

from dataclasses import dataclass

from serve.experiments.phases import Action
from serve.experiments.results import GuardrailResult, Results


@dataclass(frozen=True, slots=True)
class Due:
    """An action, and the words for it that the audit keeps."""

    action: Action
    reason: str


def due(results: Results) -> Due | None:
    """The gravest action that a breached guardrail of ``results`` asks for."""
    for action in (Action.ROLL_BACK, Action.PAUSE):
        for guarded in results.guardrails:
            if guarded.is_breached and guarded.action == action:
                return Due(action, described(guarded))
    return None


def described(guarded: GuardrailResult) -> str:
    """A guardrail's finding in words."""
    return (
        f"guardrail {guarded.metric}: '{guarded.arm}' is worse than control by at least {guarded.at_least or 0.0:.4g} "
        f"(estimate {guarded.harm or 0.0:.4g}), and {guarded.tolerance:.4g} is borne"
    )
