"""How a soak's clients ask: each request with a deadline, each answer held against what is right."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

from tests.soak.ledger import Ledger, Meaning
from tests.soak.tally import Tally
from tests.soak.world import TARGETS, Expected, Question, chat

DEADLINE_S = 60.0
"""A request that has not ended by then hangs."""


@dataclass(frozen=True, slots=True)
class Client:
    """Clients of one service, in one event loop."""

    http: httpx.AsyncClient
    openai: openai.AsyncOpenAI
    expected: Expected
    ledger: Ledger
    tally: Tally
    ending: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def goes_on(self) -> bool:
        """Whether there is to be more load."""
        return not self.ending.is_set()

    async def send(
        self, activity: str, method: str, path: str, *, due: Iterable[int] = (200,), **request: Any
    ) -> httpx.Response | None:
        """A request whose status must be one of ``due``; None where it was not, which is counted."""
        try:
            with self.tally.timed(activity):
                async with asyncio.timeout(DEADLINE_S):
                    response = await self.http.request(method, path, **request)
        except TimeoutError:
            self.tally.find("hung", activity, f"{method} {path}: nothing in {DEADLINE_S:g} s")
            return None
        except httpx.HTTPError as error:
            self.tally.find("failed", activity, f"{method} {path}: {type(error).__name__}: {error}")
            return None
        if response.status_code in due:
            return response
        self.tally.find("failed", activity, f"{method} {path}: {response.status_code} {response.text[:300]}")
        return None

    async def ask(
        self, activity: str, model: str, question: Question, meant: Iterable[Meaning] = (), **request: Any
    ) -> httpx.Response | None:
        """Ask for a whole answer, and check it. ``meant``: targets that may answer; what the ledger says if empty."""
        begun = time.monotonic()
        body = chat(model, question)
        response = await self.send(activity, "POST", "/v1/chat/completions", due=(200, 404), json=body, **request)
        if response is None:
            return None
        text = None if response.status_code == 404 else response.json()["choices"][0]["message"]["content"]
        self.check(activity, model, question, text, begun, meant)
        return None if text is None else response

    async def stream(self, activity: str, model: str, question: Question) -> None:
        """Read a stream to its end, as OpenAI's own client does, and check what it said."""
        begun, text = time.monotonic(), ""
        reasons: list[str] = []
        try:
            with self.tally.timed(activity):
                async with asyncio.timeout(DEADLINE_S):
                    stream = await self.openai.chat.completions.create(**chat(model, question, stream=True))
                    async for chunk in stream:
                        for choice in chunk.choices:
                            text += choice.delta.content or ""
                            reasons += [choice.finish_reason] if choice.finish_reason else []
        except openai.NotFoundError:
            self.check(activity, model, question, None, begun)
            return
        except TimeoutError:
            self.tally.find("hung", activity, f"a stream of {model}: no end in {DEADLINE_S:g} s")
            return
        except (openai.OpenAIError, httpx.HTTPError) as error:
            self.tally.find("failed", activity, f"a stream of {model}: {type(error).__name__}: {error}")
            return
        if len(reasons) != 1:
            self.tally.find("wrong", activity, f"a stream of {model} ended with finish reasons {reasons}")
        self.check(activity, model, question, text, begun)

    def check(
        self,
        activity: str,
        model: str,
        question: Question,
        text: str | None,
        begun: float,
        meant: Iterable[Meaning] = (),
    ) -> None:
        """``text`` (None: there is no such model) must be what one of the targets that may be meant answers."""
        stated = {model} if model in TARGETS else set(meant)
        allowed = stated or self.ledger.meanings.allowed(model, begun, time.monotonic())
        right = {None if target is None else self.expected.of(target, question) for target in allowed}
        if text not in right:
            self.tally.find("wrong", activity, f"{model}, {question.name}: {text!r}, and {right} is right ({allowed})")
