"""Whose fault a failed answer is: the one place that decides what counts against an arm of an experiment.

ARM      Its target is gone, broken, out of reach or unfit for what is asked, or the service failed while it answered.
         Time that ran out counts here too: an arm that hangs or never stops must not look healthy.
REQUEST  Any arm would have failed: a prompt that does not fit, an image that cannot be read, a bad option. So does what
         the alias's own target refuses as well, and an answer that took too long because the request forbade it to end.
LOAD     There was no room or no turn in time: who floods an arm must not be able to end it.
LEFT     The client was gone before the answer's end.

Only ARM is an error of the arm. The others say nothing of it: they are left out of its error rate altogether, so that
they cannot hide its errors either.
"""

from __future__ import annotations

from enum import StrEnum

from lora_runtime.errors import (
    AdapterMissing,
    AdapterRejected,
    CallerError,
    DeadlineExceeded,
    InvalidCombination,
    LoomError,
    NotFound,
    Overloaded,
    StoreUnavailable,
    TurnTimeout,
)

BROKEN = (AdapterMissing, AdapterRejected, StoreUnavailable)
"""The target's adapters cannot be served, whatever is asked of them."""
UNFIT = (NotFound, InvalidCombination)
"""The target lacks what is asked for, such as a classification head: its own fault where the alias's target has it."""


class Blame(StrEnum):
    ARM = "arm"
    REQUEST = "request"
    LOAD = "load"
    LEFT = "left"


def blame_of(
    error: LoomError | None, *, is_default: bool, arms_error: LoomError | None = None, never_ends: bool = False
) -> Blame:
    """Whose fault it is that an answer failed with ``error``; None: that its client left.

    ``is_default``: the target that failed is the alias's own. ``arms_error``: why the arm was left for it.
    ``never_ends``: the answer had begun, and the request forbade it to end by itself.
    """
    found = Blame.LEFT if error is None else _of(error, never_ends)
    if is_default and isinstance(error, UNFIT) and not isinstance(error, BROKEN):
        found = Blame.REQUEST
    if found is Blame.REQUEST or arms_error is None:
        return found
    if isinstance(arms_error, BROKEN):
        return Blame.ARM
    # That the arm was unfit would be its fault only if the alias's own target had answered.
    return Blame.REQUEST if found in (Blame.LOAD, Blame.LEFT) else found


def _of(error: LoomError, never_ends: bool) -> Blame:
    if isinstance(error, BROKEN + UNFIT):
        return Blame.ARM
    if isinstance(error, CallerError):
        return Blame.REQUEST
    if isinstance(error, TurnTimeout):
        return Blame.LOAD
    if isinstance(error, DeadlineExceeded):
        return Blame.REQUEST if never_ends else Blame.ARM
    return Blame.LOAD if isinstance(error, Overloaded) else Blame.ARM
