"""A deterministic engine without a model: for tests of what stands around an engine.

It answers with words of the prompt and the target, so that a test sees who was asked what; it can
be told to be slow, full or broken. It obeys the protocol in everything else: limits, stop strings,
cancellation, deadlines, typed errors.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from lora_runtime.engine.prompt_length import check_tokens
from lora_runtime.engine.protocol import (
    AdapterInfo,
    AdapterRef,
    Alternative,
    ChatPrompt,
    Classification,
    ClassifyRequest,
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerateRequest,
    ImagePart,
    Prompt,
    TextPart,
    TextPrompt,
    Token,
    TokenEvent,
    TokenPrompt,
    Usage,
)
from lora_runtime.errors import (
    ContextOverflow,
    DeadlineExceeded,
    EngineFault,
    InvalidImage,
    NotFound,
    Overloaded,
)
from lora_runtime.folder import CONFIG_NAME, fingerprint, read_json, tensors_file

HEAD = "score"
LABELS = ("no", "yes")


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeConfig:
    """``token_s`` is the pause before each token. ``max_running`` more requests are refused as Overloaded, and so are
    more pins than ``max_slots``.

    ``fail_after`` tokens the engine breaks, if the prompt says "fail"; at 0 before the first.
    """

    token_s: float = 0.0
    max_running: int = 64
    max_model_len: int = 256
    max_slots: int = 64
    fail_after: int = 1


class FakeEngine:
    """Implements :class:`lora_runtime.engine.protocol.Engine`."""

    def __init__(self, config: FakeConfig) -> None:
        self._config = config
        self._running = 0
        self._counters: Counter[str] = Counter(cancelled=0, finished=0)
        self._used: dict[str, None] = {}
        self._pinned: set[str] = set()

    @property
    def info(self) -> EngineInfo:
        limit = self._config.max_running
        return EngineInfo(
            kind="fake",
            device="none",
            dtype="none",
            max_model_len=self._config.max_model_len,
            max_batch_size=limit,
            max_slots=self._config.max_slots,
        )

    async def start(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do."""

    async def examine(self, path: str) -> AdapterInfo:
        """Any folder with an adapter's files will do, whatever is in them."""
        config = read_json(Path(path) / CONFIG_NAME)
        return AdapterInfo(
            version=fingerprint(path),
            num_bytes=tensors_file(Path(path)).stat().st_size,
            max_rank=1,
            lora_modules=1,
            saved_modules=(),
            heads={HEAD: LABELS} if config.get("head") else {},
            touches_vision=False,
        )

    async def check(self, prompt: Prompt) -> None:
        """Token ids are its words; what else is too long is refused with its target's name, which is one as well."""
        if isinstance(prompt, TokenPrompt):
            check_tokens(len(prompt.token_ids), self._config.max_model_len, "prompt")

    async def generate(self, request: GenerateRequest) -> AsyncIterator[TokenEvent]:
        words = self._words(request.prompt, _label(request))
        prompt_tokens = len(words)
        limit = self._config.max_model_len
        if prompt_tokens + (request.sampling.max_tokens or 1) > limit:
            raise ContextOverflow(f"The prompt has {prompt_tokens} tokens; the context holds {limit}.", limit=limit)
        if self._running >= self._config.max_running:
            raise Overloaded("The engine is full; try again shortly.", retry_after_s=1)
        self._running += 1
        was_cold = not self._used.keys() >= {ref.version for ref in request.adapters}
        self._used.update(dict.fromkeys(ref.version for ref in request.adapters))
        deadline = None if request.timeout_s is None else time.monotonic() + request.timeout_s
        is_finished = False
        try:
            async for event in self._events(request, words, deadline, was_cold):
                yield event
            is_finished = True
        finally:
            self._running -= 1
            self._counters["finished" if is_finished else "cancelled"] += 1

    async def classify(self, request: ClassifyRequest) -> Classification:
        has_head = any(read_json(Path(ref.path) / CONFIG_NAME).get("head") for ref in request.adapters)
        if not has_head or request.head not in (None, HEAD):
            raise NotFound("No such classification head in the target. Name an adapter that was trained with one.")
        words = self._words(request.prompt, "")
        check_tokens(len(words), self._config.max_model_len, "input")
        is_yes = len(words) % 2
        return Classification(
            labels=LABELS,
            probabilities=(0.1, 0.9) if is_yes else (0.9, 0.1),
            logits=(-1.0, 1.0) if is_yes else (1.0, -1.0),
            usage=Usage(prompt_tokens=len(words), completion_tokens=0),
        )

    async def prefetch(self, adapter: AdapterRef) -> None:
        """There is nothing to read."""

    async def pin(self, adapter: AdapterRef) -> None:
        if len(self._pinned - {adapter.version}) >= self._config.max_slots:
            raise Overloaded("Pins hold every slot.", retry_after_s=1)
        self._pinned.add(adapter.version)
        self._used[adapter.version] = None

    async def unpin(self, version: str) -> None:
        """Nothing leaves a fake engine's slots, but others may be pinned."""
        self._pinned.discard(version)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=self._running,
            waiting=0,
            resident=tuple(self._used),
            held_slots=0,
            kv_used_tokens=0,
            kv_capacity_tokens=self._config.max_model_len,
            counters=dict(self._counters),
        )

    async def check_health(self) -> None:
        """Always healthy."""

    async def _events(
        self, request: GenerateRequest, words: list[str], deadline: float | None, was_cold: bool
    ) -> AsyncIterator[TokenEvent]:
        sampling = request.sampling
        wanted = min(sampling.max_tokens or len(words), self._config.max_model_len)
        answer = [words[i % len(words)] for i in range(wanted)] if sampling.max_tokens else words
        generated = 0
        for choice in range(sampling.n):
            for number, word in enumerate(answer):
                await asyncio.sleep(self._config.token_s)
                if deadline is not None and time.monotonic() > deadline:
                    raise DeadlineExceeded("The request ran out of time.", retry_after_s=1)
                if "fail" in words and number >= self._config.fail_after:
                    raise EngineFault("The fake engine broke, as it was told to.")
                generated += 1
                is_stop = any(stop in word for stop in sampling.stop)
                is_end = is_stop or number == len(answer) - 1
                is_last = is_end and choice == sampling.n - 1
                reason: FinishReason | None = None
                if is_end:
                    reason = "length" if sampling.max_tokens and not is_stop else "stop"
                usage = Usage(prompt_tokens=len(words), completion_tokens=generated, was_cold=was_cold)
                yield TokenEvent(
                    choice=choice,
                    text="" if is_stop else f"{word} ",
                    tokens=(_token(word, sampling.logprobs),),
                    finish_reason=reason,
                    usage=usage if is_last else None,
                )
                if is_end:
                    break

    @staticmethod
    def _words(prompt: Prompt, label: str) -> list[str]:
        if isinstance(prompt, ChatPrompt):
            parts = [part for message in prompt.messages for part in message.parts]
            for part in parts:
                if isinstance(part, ImagePart) and not part.data.startswith(b"\x89PNG"):
                    raise InvalidImage("image 1 of 1 is no image that can be read; send a PNG.")
            text = " ".join(part.text if isinstance(part, TextPart) else "<image>" for part in parts)
        elif isinstance(prompt, TextPrompt):
            text = prompt.text
        else:
            text = " ".join(str(token) for token in prompt.token_ids)
        return [label, *text.split()]


def _label(request: GenerateRequest) -> str:
    return "+".join(f"{ref.name}:{ref.weight:g}" for ref in request.adapters) or "base"


def _token(word: str, logprobs: int | None) -> Token:
    token_id = sum(word.encode())
    top = (Alternative(token_id=token_id, text=word, token_bytes=word.encode(), logprob=-0.5),) if logprobs else ()
    logprob = None if logprobs is None else -0.5
    return Token(token_id=token_id, text=word, token_bytes=word.encode(), logprob=logprob, top=top)
