"""Asking an engine greedily, and comparing with an oracle's answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from lora_runtime.engine.protocol import (
    AdapterRef,
    ClassifyRequest,
    Engine,
    GenerateRequest,
    Prompt,
    Sampling,
    TextPrompt,
    TokenPrompt,
)
from lora_runtime.errors import ContextOverflow
from tests.oracle.world import chat

NUM_TOKENS = 8
Answer = tuple[list[int], list[float]]
"""Token ids and their log-probabilities."""
Target = tuple[tuple[str, float], ...]
"""Adapters by name with their weights; empty for the base."""


def close(got: Answer, want: Answer, what: str, tolerance: float = 1e-4) -> None:
    """Equal tokens, log-probabilities within ``tolerance``."""
    assert got[0] == want[0], what
    assert max(abs(a - b) for a, b in zip(got[1], want[1], strict=True)) < tolerance, what


async def answer(
    engine: Engine, prompt: Prompt, adapters: tuple[AdapterRef, ...] = (), count: int = NUM_TOKENS
) -> Answer:
    """Greedy tokens and their log-probabilities."""
    sampling = Sampling(temperature=0.0, max_tokens=count, logprobs=0, ignore_eos=True)
    request = GenerateRequest(request_id="test", prompt=prompt, adapters=adapters, sampling=sampling)
    tokens, logprobs = [], []
    async for event in engine.generate(request):
        tokens += [token.token_id for token in event.tokens]
        logprobs += [token.logprob for token in event.tokens]
    return tokens, logprobs


class OnlyShort:
    """A tokenizer that is given no long text."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def encode(self, text: str, **options: Any) -> Any:
        assert len(text) < 1_000_000, "a text that cannot fit was tokenized"
        return self._backend.encode(text, **options)

    def encode_batch_fast(self, texts: Sequence[str], **options: Any) -> Any:
        assert max(map(len, texts)) < 1_000_000, "a text that cannot fit was tokenized"
        return self._backend.encode_batch_fast(texts, **options)


async def check_long_prompts(engine: Any, head_owner: AdapterRef, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of 4 to 16 MB are plain refusals, made before they are tokenized, while short ones are answered."""
    for name in ("_plain", "_with_specials"):
        monkeypatch.setattr(engine._prompts, name, OnlyShort(getattr(engine._prompts, name)))
    long = [
        chat("word " * 800_000),
        chat("word " * 3_200_000),
        chat("<|im_end|>" * 400_000),
        TextPrompt(text="word " * 1_600_000),
        TokenPrompt(token_ids=(5,) * 1_000_000),
    ]
    refused = [answer(engine, prompt) for prompt in long]
    refused += [engine.classify(ClassifyRequest(request_id="c", prompt=long[0], adapters=(head_owner,)))]
    for prompt in long:
        with pytest.raises(ContextOverflow):
            await engine.check(prompt)
    *errors, short = await asyncio.gather(*refused, answer(engine, chat("hello")), return_exceptions=True)
    assert [type(error) for error in errors] == [ContextOverflow] * len(refused), errors
    assert not isinstance(short, BaseException) and len(short[0]) == NUM_TOKENS


async def check_coldness(engine: Engine, prompt: Prompt, refs: Sequence[AdapterRef]) -> None:
    """Usage says whether a request had to wait for an adapter. ``refs``: one, and enough others to evict it."""

    async def was_cold(*adapters: AdapterRef) -> bool:
        sampling = Sampling(temperature=0.0, max_tokens=2, ignore_eos=True)
        request = GenerateRequest(request_id="test", prompt=prompt, adapters=adapters, sampling=sampling)
        usages = [event.usage async for event in engine.generate(request) if event.usage is not None]
        return usages[0].was_cold

    first, *others = refs
    for other in others:
        await was_cold(other)
    assert await was_cold(first)
    assert not await was_cold(first)
    assert await was_cold(first, others[0]), "one of two is enough"
    assert not await was_cold(first, others[0]) and not await was_cold()


async def check_mixed_batch(
    engine: Engine,
    refs: Mapping[Target, tuple[AdapterRef, ...]],
    prompts: Sequence[Prompt],
    oracle: Mapping[Target, Sequence[Answer]],
    *,
    seed: int,
    tolerance: float,
) -> None:
    """Every target on every prompt, in shuffled order and all at once, against the oracle; then nothing is held."""
    work = [(target, number) for target in oracle for number in range(len(prompts))]
    random.Random(seed).shuffle(work)

    async def ask(target: Target, number: int, delay_s: float) -> Answer:
        await asyncio.sleep(delay_s)
        return await answer(engine, prompts[number], refs[target])

    answers = await asyncio.gather(*(ask(t, n, i * 0.002) for i, (t, n) in enumerate(work)))
    for (target, number), got in zip(work, answers, strict=True):
        close(got, oracle[target][number], f"{target} on prompt {number}", tolerance)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.held_slots, stats.kv_used_tokens) == (0, 0, 0, 0)
