"""What the probes' answers say of a merge: a report, or the error that it is not what was meant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch

from lora_runtime.errors import VerificationFailed
from lora_runtime.merge.probes import (
    Answers,
    Difference,
    Generation,
    Probe,
    answers,
    are_finite,
    difference,
    generated,
    prompts,
)
from lora_runtime.merge.shard import TensorReport


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What two ways to compute one function may differ by: KL in nats; the farthest logit, in standard deviations of
    the logits; and the share of likeliest tokens that must agree."""

    kl: float
    logit: float
    agreement: float


TOLERANCES: Mapping[torch.dtype, Tolerance] = MappingProxyType(
    {
        torch.float32: Tolerance(kl=1e-5, logit=0.05, agreement=0.98),
        torch.bfloat16: Tolerance(kl=1e-2, logit=1.0, agreement=0.85),
    }
)
"""By the dtype that answers are computed in, whatever is stored: what is stored is rounded once, and so is what it is
compared with. Right merges of small models were at most 3e-9 nats, 7e-4 of a logit and no token apart in fp32 (where a
checkpoint stores bf16, entries that round the other way), and 4e-4 nats, 0.3 of a logit and 4 % of the tokens in bf16.
Deep models add up more of it. A weight of 0.7 instead of 0.5 is a sixth of the KL that the adapter makes."""
TELLING = 10.0
"""An adapter moves the answers by this many times the KL that is allowed, or the probes do not tell much: a weight that
is wrong by a third then shows, since KL grows with its square."""
LOST = "The base's dtype rounds the whole merge away"
LARGE_ROUNDING = 0.2
"""‖out - (W+Δ)‖/‖Δ‖ above which part of what was trained is lost."""


def tolerance_of(dtype: torch.dtype) -> Tolerance:
    """Of answers computed in ``dtype``. Raises ValueError for a dtype that no probe runs in."""
    if dtype not in TOLERANCES:
        raise ValueError(f"probes run in {', '.join(map(str, TOLERANCES))}; not in {dtype}")
    return TOLERANCES[dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeReport:
    """What the probes showed. All of it can be JSON; nothing of it is anybody's data.

    KL is in nats, the mean over ``num_positions``: ``kl_to_expected`` KL(expected ‖ merged), ``kl_to_base``
    KL(base ‖ merged), ``kl_of_rounding`` KL(expected before it was rounded to the checkpoint's dtype ‖ after).
    ``agreement_with_expected``: the share of positions with the same likeliest token. ``max_abs_logit``: the farthest
    that a logit is from the expected one. ``is_same_as_base``: bit for bit. ``loaded_by``: libraries and versions.
    """

    kl_to_expected: float
    agreement_with_expected: float
    max_abs_logit: float
    kl_to_base: float
    kl_of_rounding: float
    is_same_as_base: bool
    num_positions: int
    generation: tuple[Generation, ...]
    loaded_by: str
    warnings: list[str]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reference:
    """The base's and the expected answers. ``exact``: the expected ones before rounding to what is stored."""

    probes: Sequence[Probe]
    base: Answers
    exact: Answers
    expected: Answers
    is_zero: bool
    faults: Mapping[str, list[str]]


def rounding_warnings(reports: Mapping[str, TensorReport]) -> list[str]:
    """What to tell of tensors, by name, whose dtype lost more than LARGE_ROUNDING of their change; nothing if none."""
    lost = {name: report for name, report in reports.items() if report.rounding > LARGE_ROUNDING}
    if not lost:
        return []
    worst = sorted(lost, key=lambda name: (-lost[name].rounding, name))[:3]
    shown = ", ".join(
        f"{name} ({lost[name].rounding:.0%}, {lost[name].changed:.0%} of its entries changed)" for name in worst
    )
    return [
        f"{len(lost)} of {len(reports)} changed tensors lost more than {LARGE_ROUNDING:.0%} of their change to "
        f"rounding, most of all {shown}. The change is small beside what the dtype can tell apart in the weights: "
        "keep it as an adapter, which holds it in fp32, or merge into a base stored in fp32."
    ]


def judged(
    model: Any,
    reference: Reference,
    tolerance: Tolerance,
    warnings: list[str],
    loaded_by: str,
    *,
    allow_lost: bool = False,
) -> ProbeReport:
    """The report on ``model``, the merge as it was loaded. ``warnings``: those that there are already. ``allow_lost``:
    that rounding took the whole change away is a warning too. Raises VerificationFailed, with the report in its facts
    if the answers are finite."""
    merged = answers(model, reference.probes)
    _check_finite(reference, merged)
    seen = _Seen(
        to_expected=difference(reference.expected, merged),
        to_base=difference(reference.base, merged),
        intended=difference(reference.exact, reference.base),
        rounding=difference(reference.exact, reference.expected),
    )
    generation = tuple(generated(model, *prompt) for prompt in prompts(model, reference.probes, reference.expected))
    report = ProbeReport(
        kl_to_expected=seen.to_expected.kl,
        agreement_with_expected=seen.to_expected.agreement,
        max_abs_logit=seen.to_expected.max_abs_logit,
        kl_to_base=seen.to_base.kl,
        kl_of_rounding=seen.rounding.kl,
        is_same_as_base=seen.to_base.is_same,
        num_positions=seen.to_base.num_positions,
        generation=generation,
        loaded_by=loaded_by,
        warnings=[*warnings, *_effect(reference.is_zero, seen, tolerance), *_unverified(generation)],
    )
    _check_function(report, seen, tolerance, allow_lost)
    _check_generation(report)
    return report


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """From the expected answers, and from the base's, to the merge's; from the exact answers to the base's, and to the
    expected ones, which are rounded as the checkpoint is."""

    to_expected: Difference
    to_base: Difference
    intended: Difference
    rounding: Difference

    @property
    def is_lost(self) -> bool:
        """Whether the merge is as expected, which is the base, and was to be more than that."""
        return self.to_base.is_same and self.to_expected.is_same and not self.intended.is_same


def _check_finite(reference: Reference, merged: Answers) -> None:
    if not are_finite([*reference.base, *reference.exact, *reference.expected]):
        raise VerificationFailed(
            "The base answers with NaN or infinity, by itself or with the expected adapter: the inputs are at fault, "
            "not the merge. Look for overflow in them, or lower the weights.",
            check="finite",
        )
    if not are_finite(merged):
        raise VerificationFailed(
            "The merge answers with NaN or infinity where the base with the expected adapter does not: a tensor of it "
            "is damaged. Merge again.",
            check="finite",
        )


def _effect(is_zero: bool, seen: _Seen, tolerance: Tolerance) -> Iterator[str]:
    if is_zero:
        yield "The merge changes nothing of the base, as was asked: its weights are zero, or its inputs do nothing."
    elif seen.intended.is_same:
        yield "The probes do not reach what the merge changes: the base with the expected adapter answers as the base."
    elif seen.is_lost:
        yield f"{LOST}. Keep it as a LoRA, or merge into a base stored in fp32."
    else:
        if seen.intended.kl < TELLING * tolerance.kl:
            yield (
                f"The expected adapter moves the answers by {seen.intended.kl:.2g} nats only, where rounding may by "
                f"{tolerance.kl:.2g}: the probes hardly tell a right merge from a wrong one. Verify in fp32, or see "
                "whether its weights are as small as they were meant to be."
            )
        if seen.rounding.kl > LARGE_ROUNDING**2 * seen.intended.kl:
            yield (
                f"Rounding to the base's dtype moves the answers by {seen.rounding.kl:.2g} nats, where the expected "
                f"adapter moves them by {seen.intended.kl:.2g}: part of it is lost. Keep it as a LoRA, or merge into "
                "a base stored in fp32."
            )


def _unverified(generation: Iterable[Generation]) -> Iterator[str]:
    for one in generation:
        if not one.is_expected:
            yield (
                f"After each probe ({one.probe}) the base with the expected adapter ends at once: that the merge "
                "generates is not verified."
            )


def _check_function(report: ProbeReport, seen: _Seen, tolerance: Tolerance, allow_lost: bool) -> None:
    found, intended = seen.to_expected, seen.intended.kl
    if report.is_same_as_base and not found.is_same:
        raise VerificationFailed(
            "The merge changes nothing: it answers bit for bit as the base, where the base with the expected adapter "
            f"is {intended:.3g} nats away. Its names match nothing when it is loaded, or it is a copy of the base; "
            "write it again.",
            check="no-op",
            report=asdict(report),
        )
    if seen.is_lost and not allow_lost:
        raise VerificationFailed(
            f"{LOST}: it answers bit for bit as the base, from which {intended:.3g} nats were meant. Keep it as a "
            "LoRA, or merge into a base stored in fp32.",
            check="lost",
            report=asdict(report),
        )
    farthest = tolerance.logit * found.spread
    if found.kl > tolerance.kl or found.max_abs_logit > farthest or found.agreement < tolerance.agreement:
        raise VerificationFailed(
            f"The merge does not do what was meant. From the base with the expected adapter it is {found.kl:.3g} nats "
            f"away (at most {tolerance.kl:.2g}), a logit by {found.max_abs_logit:.3g} (at most {farthest:.2g}), and "
            f"{found.agreement:.1%} of the likeliest tokens agree (at least {tolerance.agreement:.0%}); the expected "
            f"adapter moves the base by {intended:.3g} nats. A tensor or a weight is wrong; merge again, and "
            "compare the inputs' versions if it stays.",
            check="function",
            report=asdict(report),
        )


def _check_generation(report: ProbeReport) -> None:
    for generation in report.generation:
        if generation.is_expected and not generation.num_ordinary:
            raise VerificationFailed(
                f"After a probe ({generation.probe}, {generation.num_prompt_tokens} tokens) the merge generates "
                "nothing, where the base with the expected adapter goes on. Its generation config or its special "
                "tokens are not the base's.",
                check="generation",
                report=asdict(report),
            )
