"""Scores from engines: what is asked of them, how much at once, and what becomes of errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from lora_runtime.engine.factory import create_engine
from lora_runtime.engine.protocol import (
    AdapterRef,
    ChatPrompt,
    GenerateRequest,
    Message,
    Sampling,
    TextPart,
    TokenEvent,
)
from lora_runtime.errors import NotFound, Overloaded
from lora_runtime.merge.evaluating import batched, engine_evaluator
from lora_runtime.merge.examples import Example

REFS = {name: AdapterRef(version=name * 64, path=f"/{name}", name=name, weight=7.0) for name in "abc"}


def examples(count: int) -> list[Example]:
    return [
        Example(
            prompt=ChatPrompt(messages=(Message(role="user", parts=(TextPart(text=str(n)),)),)),
            answer=f"the answer {n}",
            metric="exact" if n % 2 else "words",
        )
        for n in range(count)
    ]


class Client:
    """Answers "The Answer n" in two lists of events, or fails on one question."""

    def __init__(self, failing: str | None = None) -> None:
        self.requests: list[GenerateRequest] = []
        self.running = self.most = self.ended = 0
        self._failing = failing

    async def generate(self, request: GenerateRequest) -> AsyncIterator[list[TokenEvent]]:
        self.requests.append(request)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            question = text_of(request)
            if question == self._failing:
                raise Overloaded("No room now.", retry_after_s=1)
            await asyncio.sleep(0.01 if self._failing is None else 10)
            said = "right" if question == "0" else question
            yield [TokenEvent(choice=0, text="The ", tokens=()), TokenEvent(choice=0, text="Answer ", tokens=())]
            yield [TokenEvent(choice=0, text=said, tokens=(), finish_reason="stop")]
        finally:
            self.running -= 1
            self.ended += 1


def text_of(request: GenerateRequest) -> str:
    assert isinstance(request.prompt, ChatPrompt)
    (part,) = request.prompt.messages[0].parts
    assert isinstance(part, TextPart)
    return part.text


async def test_every_example_is_a_request_of_the_combination():
    client = Client()
    evaluate = engine_evaluator(client.generate, REFS, max_tokens=9, at_once=3)
    scores = await evaluate({"a": 0.5, "b": 0.0, "c": -0.25}, examples(7))
    assert scores == [pytest.approx(2 / 3), 1, 1, 1, 1, 1, 1]
    assert client.most == 3
    assert len({request.request_id for request in client.requests}) == 7
    for request in client.requests:
        assert [(ref.name, ref.version, ref.weight) for ref in request.adapters] == [
            ("a", "a" * 64, 0.5),
            ("c", "c" * 64, -0.25),
        ]
        assert request.sampling == Sampling(max_tokens=9, temperature=0.0)
        assert not request.is_spare and request.timeout_s == 300.0


async def test_the_bound_is_for_all_calls_together():
    client = Client()
    evaluate = engine_evaluator(client.generate, REFS, max_tokens=9, at_once=2)
    await asyncio.gather(*(evaluate({"a": 1.0}, examples(3)) for _ in range(3)))
    assert client.most == 2 and client.ended == 9


async def test_the_first_error_passes_and_ends_the_rest():
    client = Client(failing="2")
    evaluate = engine_evaluator(client.generate, REFS, max_tokens=9, at_once=3)
    with pytest.raises(Overloaded, match="No room") as caught:
        await asyncio.wait_for(evaluate({"a": 1.0}, examples(9)), 5)
    assert caught.value.facts == {"retry_after_s": 1}
    assert client.running == 0 and client.ended < 9


async def test_a_name_without_an_adapter():
    evaluate = engine_evaluator(Client().generate, REFS, max_tokens=9, at_once=3)
    with pytest.raises(NotFound, match="no adapter 'd'") as caught:
        await evaluate({"a": 1.0, "d": 0.0}, examples(1))
    assert caught.value.facts == {"near": ["a", "b", "c"]}


async def test_an_engine_of_ones_own_is_asked_alike():
    engine = create_engine("fake", {})
    await engine.start()
    try:
        evaluate = engine_evaluator(batched(engine), {}, max_tokens=4, at_once=2)
        said = []
        for example in examples(2):
            request = GenerateRequest(request_id="x", prompt=example.prompt, sampling=Sampling(max_tokens=4))
            said.append("".join([event.text async for event in engine.generate(request)]))
        right = [
            Example(prompt=example.prompt, answer=answer) for example, answer in zip(examples(2), said, strict=True)
        ]
        assert await evaluate({}, right) == [1.0, 1.0]
    finally:
        await engine.close()
