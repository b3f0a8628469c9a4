"""The soak finds what it is to find: wrong answers, lost changes, requests that hang, and memory that grows."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tests.soak import client as clients
from tests.soak import memory as memories
from tests.soak.client import Client
from tests.soak.ledger import Held, Ledger, Meanings
from tests.soak.memory import Memory
from tests.soak.tally import Tally
from tests.soak.verify import verify_adapters
from tests.soak.world import Expected, Question

QUESTION = Question("q", [{"role": "user", "content": "All shapes?"}])
ANSWERS = {("shape", "q"): "circle", ("french", "q"): "rouge"}


class Rows:
    """A registry without rows."""

    def rows(self, query: str, **values: Any) -> list[Any]:
        return []


def client_of(answer: Any, ledger: Ledger | None = None) -> Client:
    http = httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://service")
    return Client(http, None, Expected(ANSWERS), ledger or Ledger(), Tally())  # type: ignore[arg-type]


def saying(text: str) -> Any:
    body = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
    return lambda _: httpx.Response(200, json=body)


@pytest.mark.parametrize(("text", "found"), [("circle", 0), ("rouge", 1), ("", 1)])
async def test_another_targets_answer_is_wrong(text: str, found: int):
    client = client_of(saying(text))
    await client.ask("ask", "shape", QUESTION)
    assert client.tally.found["wrong", "ask"] == client.tally.num_found == found


async def test_an_answer_under_a_name_that_means_nothing_is_wrong():
    client = client_of(saying("circle"))
    await client.ask("ask", "soak-0-0", QUESTION)
    assert client.tally.found["wrong", "ask"] == 1


async def test_a_status_that_was_not_due_is_a_failure():
    client = client_of(lambda _: httpx.Response(500, text="broken"))
    assert await client.ask("ask", "shape", QUESTION) is None
    assert client.tally.found["failed", "ask"] == 1


async def test_no_answer_by_the_deadline_is_hung(monkeypatch: pytest.MonkeyPatch):
    async def never(_: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(clients, "DEADLINE_S", 0.05)
    client = client_of(never)
    await client.ask("ask", "shape", QUESTION)
    assert client.tally.found["hung", "ask"] == client.tally.num_found == 1


def test_a_name_may_mean_old_and_new_while_a_change_is_under_way():
    meanings = Meanings()
    with meanings.changing({"a": "shape"}):
        pass
    acknowledged = meanings.last_change("a")
    with meanings.changing({"a": "french"}):
        begun = meanings.last_change("a")
        assert meanings.allowed("a", begun, begun) == {"shape", "french"}
    ended = meanings.last_change("a")
    assert meanings.allowed("a", acknowledged, begun - 1e-9) == {"shape"}
    assert meanings.allowed("a", ended, ended + 1) == {"french"}
    assert meanings.allowed("a", 0.0, ended + 1) == {None, "shape", "french"}
    assert meanings.names() == ["a"]


async def test_a_version_that_was_acknowledged_and_is_not_there_is_lost():
    ledger = Ledger(adapters={"soak-0-0": Held({"v": "shape"}, {"latest": "v"})})

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/chat/completions":
            return saying("circle")(request)
        return httpx.Response(200, json={"data": []})

    client = client_of(answer, ledger)
    await verify_adapters(client, Rows(), set(), [QUESTION])  # type: ignore[arg-type]
    lost = " ".join(client.tally.examples["lost", "verify"])
    for what in ("adapters:", "versions of soak-0-0:", "rows of versions:", "rows of aliases:"):
        assert what in lost


@pytest.mark.parametrize(("growth", "found"), [(0.0, 0), (0.5, 0), (3.0, 1)])
def test_memory_that_keeps_growing_is_found(growth: float, found: int):
    memory = Memory(SimpleNamespace())  # type: ignore[arg-type]
    num_samples = int(memories.MIN_JUDGED_S / memories.SAMPLE_S) + 1
    for number in range(num_samples):
        at = number * memories.SAMPLE_S
        warm = min(at, memories.MIN_JUDGED_S / 3)  # caches that fill in the first half are no growth
        memory.samples["gateway"].append((at, 300 + warm + growth * at / 60))
    assert len(memory.problems()) == found
    memory.pids["engine"] = {1, 2}
    assert len(memory.problems()) == found + 1
