"""Users of a running experiment: each keeps one arm, is answered by it, and reports what came of it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Any

from lora_runtime.zoo.paths import BASE_NAME
from tests.soak.client import Client
from tests.soak.world import Question, chat

EXPERIMENT, ALIAS, PLAIN = "soak", "soak-shapes", BASE_NAME
ARMS = {"control": "shape", "treatment": "shape:1+french:1", "shadow": "size"}
NUM_USERS = 300

DEFINITION: dict[str, Any] = {
    "name": EXPERIMENT,
    "alias": ALIAS,
    "arms": [
        {"name": "control", "target": ARMS["control"]},
        {"name": "treatment", "target": ARMS["treatment"]},
        {"name": "shadow", "target": ARMS["shadow"], "shadow": True},
    ],
    "coverage": 0.9,
    "shadow": {"share": 0.2},
    "metrics": [{"name": "solved", "kind": "bool"}],
    "decision_metric": "solved",
    "guardrails": [],
}


async def begin(client: Client) -> None:
    """Have the experiment run. What its alias means is what users get who are not enrolled."""
    for method, path, body in (
        ("PUT", f"/v1/aliases/{ALIAS}", {"target": PLAIN}),
        ("POST", "/v1/experiments", DEFINITION),
        ("POST", f"/v1/experiments/{EXPERIMENT}/run", {"reason": "a soak"}),
    ):
        if await client.send("set up", method, path, due=(200, 201), json=body) is None:
            raise RuntimeError(f"{method} {path} failed: {client.tally.table()}")


@dataclass(slots=True)
class Users:
    """Users who ask, and report. ``asked``: the question of each request, for what shadow arms answered."""

    client: Client
    questions: list[Question]
    random: Random
    asked: dict[str, Question] = field(default_factory=dict)
    _numbers: count[int] = field(default_factory=count)

    async def visits(self) -> None:
        while self.client.goes_on:
            user = f"user-{self.random.randrange(NUM_USERS)}"
            request_id = f"soak-visit-{next(self._numbers)}"
            if user in self.client.ledger.arms and self.random.random() < 0.1:
                await self._leave(user, request_id)
            else:
                await self._visit(user, request_id)

    async def _visit(self, user: str, request_id: str) -> None:
        question = self.random.choice(self.client.expected.clear((PLAIN, *ARMS.values()), self.questions))
        self.asked[request_id] = question
        self.client.ledger.may_be_trials.add(request_id)
        headers = {"X-Request-Id": request_id, "X-Experiment-Unit": user}
        response = await self.client.ask("visit", ALIAS, question, [PLAIN, *ARMS.values()], headers=headers)
        if response is None:
            return
        arm = response.headers.get("X-Variant")
        self.client.ledger.may_be_trials.discard(request_id)
        self.client.ledger.trials[request_id] = arm
        self._check(user, question, response.json()["choices"][0]["message"]["content"], arm)
        if arm is not None and self.random.random() < 0.7:
            await self._report(request_id)

    def _check(self, user: str, question: Question, text: str, arm: str | None) -> None:
        ledger, find = self.client.ledger, self.client.tally.find
        right = self.client.expected.of(PLAIN if arm is None else ARMS[arm], question)
        if text != right:
            find("wrong", "visit", f"{user} in arm {arm}, {question.name}: {text!r}, and {right!r} is right")
        if arm == "shadow" or ledger.arms.get(user, arm) != arm:
            find("wrong", "visit", f"{user} was in arm {ledger.arms.get(user)}, and is in {arm} now")
        if arm is not None:
            ledger.arms[user] = arm

    async def _report(self, request_id: str) -> None:
        """Up to three reports of one key at once, of which one counts."""
        value, times = self.random.random() < 0.5, self.random.choice((1, 1, 3))
        body = {"request_id": request_id, "metric": "solved", "value": value, "idempotency_key": "first"}
        answers = await asyncio.gather(
            *(self.client.send("feedback", "POST", "/v1/feedback", json=body) for _ in range(times))
        )
        known = [answer.json() for answer in answers if answer is not None]
        if known:
            self.client.ledger.feedback[request_id] = float(value)
        if len(known) == times and [answer["repeated"] for answer in known].count(False) != 1:
            self.client.tally.find("wrong", "feedback", f"{request_id}: {known}")

    async def _leave(self, user: str, request_id: str) -> None:
        """Ask, and leave before the answer."""
        self.client.ledger.may_be_trials.add(request_id)
        headers = {"X-Request-Id": request_id, "X-Experiment-Unit": user}
        body = chat(ALIAS, self.random.choice(self.questions), stream=self.random.random() < 0.5)
        with suppress(TimeoutError):
            async with asyncio.timeout(self.random.uniform(0.01, 0.2)):
                await self.client.http.post("/v1/chat/completions", json=body, headers=headers)
        self.client.tally.leave("visit")
