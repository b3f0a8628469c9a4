"""The contract between ``serve`` and an engine: plain frozen values, no torch, no Ray, no HTTP.

Order of a call: ``examine`` an adapter once (when it is registered, by an Examiner or any engine); then ``generate`` or
``classify`` with ``AdapterRef``s. An engine loads an adapter on its own when a request names
one it does not hold, so any replica can serve any request.

Safety: an adapter that fails to load fails the requests that name it, and nothing else.
Closing the iterator of ``generate`` (or cancelling its task) cancels the request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from lora_runtime.findings import Finding

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRef:
    """One member of a target: which content, where its files lie, with what weight.

    ``version`` is the sha256 of the content; an engine refuses files that hash otherwise.
    ``name`` is for messages and metrics only, never identity.
    """

    version: str
    path: str
    name: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePart:
    """An encoded image (PNG, JPEG, WebP, …) as it arrived; decoded by the engine, under its limits."""

    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    role: Role
    parts: tuple[TextPart | ImagePart, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """Messages, rendered by the base's chat template with a generation prompt."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPrompt:
    """Raw text, tokenized as is; special tokens in it are plain text."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPrompt:
    """Token ids, used as they are."""

    token_ids: tuple[int, ...]


Prompt = ChatPrompt | TextPrompt | TokenPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    ``temperature`` 0 is greedy. ``top_k`` 0 means all. ``logprobs`` None returns none, k returns
    the chosen token's and the k best, from the raw distribution (before temperature and cuts).
    ``seed`` makes choice i reproducible from (seed, i) alone, whatever else is in the batch.
    ``max_tokens`` None means up to the context's end.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    n: int = 1
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One call. An empty ``adapters`` is the base; several are a combination (deltas add).

    ``cache_scope``: only requests of the same one share what an engine keeps of prompts. ``trace``: the caller's
    span, as W3C's ``traceparent``; engines pass it by. ``caller``: who asks, as an opaque value that holds no secret;
    callers share an engine fairly. ``is_spare``: nobody waits for the answer, so it is given up as soon as it is in
    anybody's way. The last two are for ``serve/fairness.py``; engines themselves treat all requests alike.
    """

    request_id: str
    prompt: Prompt
    adapters: tuple[AdapterRef, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    timeout_s: float | None = None
    cache_scope: str = ""
    trace: str = ""
    caller: str = ""
    is_spare: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyRequest:
    """One classification by the head ``head`` (or the only one) of the adapters named."""

    request_id: str
    prompt: Prompt
    adapters: tuple[AdapterRef, ...]
    head: str | None = None
    timeout_s: float | None = None
    cache_scope: str = ""
    trace: str = ""
    caller: str = ""
    is_spare: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    token_id: int
    text: str
    token_bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A generated token. ``logprob`` is None unless asked for; ``top`` is sorted, best first."""

    token_id: int
    text: str
    token_bytes: bytes
    logprob: float | None = None
    top: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """``was_cold``: when the request came, some adapter of it was in no slot, and had to be loaded first."""

    prompt_tokens: int
    completion_tokens: int
    was_cold: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """Progress of one choice.

    ``text`` is what may be shown now: it can lag behind ``tokens`` while a UTF-8 sequence or a
    possible stop string is incomplete, and is complete once ``finish_reason`` is set. ``usage``
    is set on the last event of the whole request and counts all choices.
    """

    choice: int
    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    logits: tuple[float, ...]
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """What ``examine`` found in an adapter that can be served.

    ``method`` is how PEFT trained it; what others than "LORA" change counts among the ``saved_modules``.
    ``findings``: what the doctor says of it beside.
    """

    version: str
    method: str = "LORA"
    num_bytes: int
    max_rank: int
    lora_modules: int
    saved_modules: tuple[str, ...]
    heads: Mapping[str, tuple[str, ...]]
    touches_vision: bool
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    kind: str
    device: str
    dtype: str
    max_model_len: int
    max_batch_size: int
    max_slots: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot. Counters only grow; ``resident`` lists versions in slots, most recent last."""

    running: int
    waiting: int
    resident: tuple[str, ...]
    held_slots: int
    kv_used_tokens: int
    kv_capacity_tokens: int
    counters: Mapping[str, float]


class Examiner(Protocol):
    """Reads and validates adapters for a base, before any engine hears of them."""

    async def examine(self, path: str) -> AdapterInfo:
        """What is in the adapter at ``path``. Raises AdapterRejected or AdapterMissing."""


class Engine(Examiner, Protocol):
    """One base on one device (or group), serving base, adapters and combinations in mixed batches."""

    @property
    def info(self) -> EngineInfo: ...

    async def start(self) -> None:
        """Make ready to serve; idempotent."""

    async def close(self) -> None:
        """Stop; running requests end with EngineFault. Idempotent."""

    async def check(self, prompt: Prompt) -> None:
        """Raise ContextOverflow for a prompt that cannot fit, whatever its tokens are: before it waits for anything.

        What passes may still be refused by :meth:`generate` and :meth:`classify`, which count tokens."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        """Stream events. Raises CallerError or Overloaded before the first event, EngineFault at any time."""

    async def classify(self, request: ClassifyRequest) -> Classification:
        """Exact label probabilities. Raises NotFound when no adapter named carries the head."""

    async def prefetch(self, adapter: AdapterRef) -> None:
        """Read ``adapter`` into host memory where the engine keeps adapters there. Raises as reading does."""

    async def pin(self, adapter: AdapterRef) -> None:
        """Bring ``adapter`` (its weight does not matter) into a slot, to stay there until :meth:`unpin`.

        Raises AdapterRejected or AdapterMissing, and Overloaded while requests and pins hold every slot.
        """

    async def unpin(self, version: str) -> None:
        """Let ``version`` be evicted again; nothing happens where it is not pinned."""

    def stats(self) -> EngineStats: ...

    async def check_health(self) -> None:
        """Raise EngineFault when the engine can no longer serve."""


def summed(adapters: Iterable[AdapterRef]) -> dict[str, float]:
    """Weight by version, none of them zero; two names of one content add up."""
    shares: dict[str, float] = {}
    for ref in adapters:
        shares[ref.version] = shares.get(ref.version, 0.0) + ref.weight
    return {version: weight for version, weight in shares.items() if weight != 0.0}
