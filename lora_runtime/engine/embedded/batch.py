"""Continuous batching: which tokens of which requests the next step computes.

``schedule`` decides and changes nothing but the waiting line; ``advance`` commits what a step
computed. No torch, no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Schedulable(Protocol):
    """What scheduling must know of a running sequence."""

    num_prompt_tokens: int
    num_computed: int


S = TypeVar("S", bound=Schedulable)


@dataclass(frozen=True, slots=True)
class Span(Generic[S]):
    """Prompt tokens [start, stop) of one sequence."""

    sequence: S
    start: int
    stop: int

    @property
    def ends_prompt(self) -> bool:
        return self.stop == self.sequence.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class StepPlan(Generic[S]):
    """One step: one new token for each of ``decode``, and some prompt tokens of ``prefill``."""

    decode: tuple[S, ...] = ()
    prefill: tuple[Span[S], ...] = ()

    @property
    def is_empty(self) -> bool:
        return not self.decode and not self.prefill


@dataclass(slots=True)
class Batch(Generic[S]):
    """The running sequences, in order of arrival."""

    max_tokens: int
    running: list[S] = field(default_factory=list)

    def join(self, sequence: S) -> None:
        self.running.append(sequence)

    def leave(self, sequence: S) -> None:
        self.running.remove(sequence)

    def schedule(self) -> StepPlan[S]:
        """Every decoding sequence advances by one token; what is left of ``max_tokens`` goes to prompts,
        first come first served, so that a long prompt never stops the others' decoding."""
        decode = tuple(s for s in self.running if s.num_computed >= s.num_prompt_tokens)
        budget = self.max_tokens - len(decode)
        prefill: list[Span[S]] = []
        for sequence in self.running:
            missing = sequence.num_prompt_tokens - sequence.num_computed
            if missing > 0 and budget > 0:
                count = min(missing, budget)
                prefill.append(Span(sequence, sequence.num_computed, sequence.num_computed + count))
                budget -= count
        return StepPlan(decode, tuple(prefill))

    @staticmethod
    def advance(plan: StepPlan[S]) -> Sequence[S]:
        """Count the plan's tokens as computed; returns the sequences that now have a next token to choose,
        decoding ones first, each in the plan's order."""
        for sequence in plan.decode:
            sequence.num_computed += 1
        for span in plan.prefill:
            span.sequence.num_computed = span.stop
        return [*plan.decode, *(span.sequence for span in plan.prefill if span.ends_prompt)]
