"""Every error Loom raises on purpose, one class per cause.

LoomError
├── CallerError                  the request or the file is at fault; retrying as is cannot help
│   ├── InvalidRequest           a field of a request is wrong
│   │   ├── ContextOverflow      prompt and answer do not fit the context
│   │   ├── InvalidImage         an image cannot be decoded or is too large
│   │   └── InvalidCombination   the weights or members of a combination make no sense
│   ├── NotFound                 a model, adapter or head that is not here
│   │   └── AdapterMissing       an adapter's files are gone
│   ├── CheckpointRejected       a base's files cannot be merged into
│   ├── MergeRefused             a recipe that cannot be carried out
│   └── AdapterRejected          an adapter's files cannot be served
│       ├── MalformedAdapter     a file is not what its name says
│       ├── UnknownModules       names that match nothing in the base
│       ├── MissingTensors       tensors the config promises and the file lacks
│       ├── ShapeMismatch        tensors whose shape the base refutes
│       ├── UnsupportedAdapter   a PEFT method or option Loom does not serve
│       ├── NonFiniteWeights     NaN or infinity in the weights
│       └── AdapterTooLarge      more bytes than may be taken in
├── Conflict                     the name is taken, or the thing is in use
├── MemoryExceeded               saved modules beyond an engine's memory for them; the engine makes room or says why not
├── Overloaded                   no room now; retry later
│   └── DeadlineExceeded         the request ran out of time
│       └── TurnTimeout          it did so before its turn came
├── VerificationFailed           a merge's result is not what it must be; nothing was published
├── StoreUnavailable             the store cannot be read or written now
│   └── AdapterLost              a registered adapter's files are gone from the store, or damaged there
└── EngineFault                  the engine itself failed

Messages say what is wrong, where, and what to do. Facts ride along as
attributes and survive pickling, because Ray carries these between processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class LoomError(Exception):
    """Base of all deliberate errors.

    ``facts`` are JSON-able details (module names, shapes, limits) for machines;
    the message alone is enough for a person.
    """

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.facts)


def packed(error: LoomError) -> tuple[str, str, dict[str, Any]]:
    """The error for a way on which only plain values travel."""
    return type(error).__name__, error.message, error.facts


def unpacked(name: str, message: str, facts: dict[str, Any]) -> LoomError:
    """What :func:`packed` was given; an :class:`EngineFault` for a class that is not known here."""
    known = {cls.__name__: cls for cls in _all_below(LoomError)}
    return known.get(name, EngineFault)(message, **facts)


def _all_below(cls: type[LoomError]) -> Iterator[type[LoomError]]:
    yield cls
    for below in cls.__subclasses__():
        yield from _all_below(below)


def _rebuild(cls: type[LoomError], message: str, facts: dict[str, Any]) -> LoomError:
    return cls(message, **facts)


class CallerError(LoomError):
    """The request or the file is at fault; retrying as is cannot help."""


class InvalidRequest(CallerError):
    """A field of a request is wrong; ``facts["param"]`` names it where known."""


class ContextOverflow(InvalidRequest):
    """Prompt and answer do not fit the context."""


class InvalidImage(InvalidRequest):
    """An image cannot be decoded, or exceeds a limit."""


class InvalidCombination(InvalidRequest):
    """The weights or members of a combination make no sense."""


class NotFound(CallerError):
    """A model, adapter or head that is not here; ``facts["near"]`` lists close names."""


class AdapterMissing(NotFound):
    """An adapter's files are gone from where they were registered."""


class CheckpointRejected(CallerError):
    """A base's checkpoint cannot be merged into: damaged, quantised, or without a place for a change."""


class MergeRefused(CallerError):
    """A recipe that cannot be carried out; ``facts["problems"]`` lists every reason."""


class AdapterRejected(CallerError):
    """An adapter's files cannot be served on this base."""


class MalformedAdapter(AdapterRejected):
    """A file is not what its name says (truncated, not JSON, not safetensors)."""


class UnknownModules(AdapterRejected):
    """Tensor names that match nothing in the base; ``facts["unmatched"]`` maps each to near names."""


class MissingTensors(AdapterRejected):
    """Tensors the config promises and the file lacks; ``facts["missing"]`` lists them."""


class ShapeMismatch(AdapterRejected):
    """Tensors whose shape the base or the config refutes."""


class UnsupportedAdapter(AdapterRejected):
    """A PEFT method or option that Loom does not serve."""


class NonFiniteWeights(AdapterRejected):
    """NaN or infinity in an adapter's weights."""


class AdapterTooLarge(AdapterRejected):
    """An adapter's files hold more bytes than may be taken in; ``facts["limit"]`` says how many."""


class Conflict(LoomError):
    """The name is taken, or the thing is in use."""


class MemoryExceeded(LoomError):
    """An adapter's saved modules do not fit beside those of the others in slots.

    ``facts``: bytes ``wanted``, ``used`` as [slot, bytes] pairs, and the ``budget``.
    """


class Overloaded(LoomError):
    """No room now; ``facts["retry_after_s"]`` says when to try again."""


class DeadlineExceeded(Overloaded):
    """The request ran out of time while waiting or running."""


class TurnTimeout(DeadlineExceeded):
    """The request ran out of time while others were served: it never began to run."""


class VerificationFailed(LoomError):
    """A merge's result is not what it must be; nothing was published."""


class StoreUnavailable(LoomError):
    """The store of adapters cannot be read or written now; nothing about the request explains it."""


class AdapterLost(StoreUnavailable):
    """A registered adapter's files are gone from the store, or damaged there; whoever asks for it cannot help it."""


class EngineFault(LoomError):
    """The engine failed; nothing about the request explains it."""
