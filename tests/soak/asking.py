"""Clients that ask: for whole answers and streams, some that leave early, and some that ask for what is refused."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Any

import httpx

from lora_runtime.zoo.paths import BASE_NAME
from tests.soak.client import Client
from tests.soak.world import TARGETS, Question, chat


@dataclass(frozen=True, slots=True)
class Asker:
    """Asks one thing after another until the load ends."""

    client: Client
    questions: list[Question]
    random: Random

    async def whole(self) -> None:
        while self.client.goes_on:
            model, question = self._chosen()
            await self.client.ask("whole answer", model, question)

    async def streams(self) -> None:
        while self.client.goes_on:
            model, question = self._chosen()
            await self.client.stream("stream", model, question)

    async def classes(self) -> None:
        """Asks for exact label probabilities, which are compared with the first ones."""
        first: dict[str, Any] = {}
        while self.client.goes_on:
            question = self.random.choice(self.questions)
            body = {"model": "warmth", "messages": question.messages}
            response = await self.client.send("classify", "POST", "/v1/classify", json=body)
            if response is not None:
                (result,) = response.json()["data"]
                known = first.setdefault(question.name, result)
                if abs(known["probability"] - result["probability"]) > 1e-3:
                    self.client.tally.find("wrong", "classify", f"{question.name}: {result}, and {known} before")
            await asyncio.sleep(self.random.uniform(0.2, 1.0))

    async def leaves(self) -> None:
        """Opens streams and leaves midway, and gives up on whole answers."""
        while self.client.goes_on:
            model, question = self._chosen()
            if self.random.random() < 0.5:
                await self._leave_stream(model, question)
            else:
                await self._give_up(model, question)

    def _chosen(self) -> tuple[str, Question]:
        """A model that means something, as far as is known now, and a question that all it may mean answer clearly."""
        names = self.client.ledger.meanings.names()
        if not names or self.random.random() < 0.4:
            target = self.random.choice(TARGETS)
            return target, self.random.choice(self.client.expected.clear([target], self.questions))
        return self.random.choice(names), self.random.choice(self.client.expected.clear(TARGETS, self.questions))

    async def _leave_stream(self, model: str, question: Question) -> None:
        body, num_lines = chat(model, question, stream=True), self.random.randint(1, 6)
        try:
            async with (
                asyncio.timeout(60),
                self.client.http.stream("POST", "/v1/chat/completions", json=body) as response,
            ):
                if response.status_code not in (200, 404):
                    self.client.tally.find("failed", "left stream", f"{model}: {response.status_code}")
                lines = response.aiter_lines()
                with suppress(StopAsyncIteration):
                    for _ in range(num_lines):
                        await anext(lines)
        except TimeoutError:
            self.client.tally.find("hung", "left stream", model)
        except httpx.HTTPError as error:
            self.client.tally.find("failed", "left stream", f"{model}: {type(error).__name__}: {error}")
        self.client.tally.leave("left stream")

    async def _give_up(self, model: str, question: Question) -> None:
        request = self.client.http.post("/v1/chat/completions", json=chat(model, question))
        with suppress(TimeoutError):
            async with asyncio.timeout(self.random.uniform(0.005, 0.3)):
                await request
        self.client.tally.leave("given up")

    async def bad(self) -> None:
        """Asks for what must be refused, each with its status."""
        cases = self._refused()
        while self.client.goes_on:
            status, method, path, request = self.random.choice(cases)
            response = await self.client.send("bad request", method, path, due=(status,), **request)
            if response is not None and not response.json()["error"]["message"]:
                self.client.tally.find("wrong", "bad request", f"{method} {path}: an error without a message")
            await asyncio.sleep(self.random.uniform(0.05, 0.3))

    def _refused(self) -> list[tuple[int, str, str, dict[str, Any]]]:
        question = self.questions[0]
        path, completions = "/v1/chat/completions", "/v1/completions"
        damaged = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
        picture = {**chat(BASE_NAME, question), "messages": [{"role": "user", "content": [damaged]}]}
        config, junk = ("adapter_config.json", b"{}"), ("adapter_model.safetensors", b"junk")
        feedback = {"request_id": "no-such-request", "metric": "solved", "value": True}
        return [
            (404, "POST", path, {"json": chat("no-such-adapter", question)}),
            (404, "POST", path, {"json": chat("shape@0000000000", question)}),
            (400, "POST", path, {"json": chat("shape:nan", question)}),
            (400, "POST", path, {"json": chat(BASE_NAME, question, temperature=-1)}),
            (400, "POST", path, {"json": chat(BASE_NAME, question, unknown_field=1)}),
            (400, "POST", path, {"json": chat(BASE_NAME, question, tools=[{"type": "function"}])}),
            (400, "POST", path, {"json": picture}),
            (400, "POST", path, {"content": b"{", "headers": {"Content-Type": "application/json"}}),
            (400, "POST", completions, {"json": {"model": "shape", "prompt": "red " * 6000, "max_tokens": 1}}),
            (404, "POST", "/v1/classify", {"json": {"model": "shape", "input": "x"}}),
            (400, "POST", "/v1/adapters", {"json": {"name": "soak-bad", "path": "/etc"}}),
            (400, "POST", "/v1/adapters/soak-bad/versions", {"files": [("files", config), ("files", junk)]}),
            (400, "POST", "/v1/adapters/soak-bad/versions", {"files": [("files", config)]}),
            (404, "DELETE", "/v1/adapters/soak-none", {}),
            (409, "DELETE", "/v1/adapters/shape/versions/latest", {}),
            (400, "PUT", "/v1/adapters/shape/aliases/abc123", {"json": {"version": "latest"}}),
            (404, "PUT", "/v1/aliases/soak-none", {"json": {"target": "no-such-adapter"}}),
            (404, "POST", "/v1/feedback", {"json": feedback}),
            (404, "GET", "/v1/experiments/no-such-experiment", {}),
            (405, "DELETE", "/v1/models", {}),
        ]


async def watches(client: Client, random: Random) -> None:
    """Looks at what operators look at, and has garbage collected."""
    paths = ("/metrics", "/readyz", "/v1/models", "/v1/adapters", "/v1/audit", "/v1/experiments/soak/results")
    while client.goes_on:
        await client.send("watch", "GET", random.choice(paths))
        if random.random() < 0.1:
            # 409 where another client's collection is under way.
            await client.send("watch", "POST", "/v1/store/collect", due=(200, 409))
        await asyncio.sleep(random.uniform(0.3, 1.0))
