"""An experiment from its first user to its promotion, on the real engine, with a gateway killed in the middle; then
one whose guardrail ends it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import sqlalchemy as sa

from lora_runtime.zoo.paths import BASE_NAME
from lora_runtime.zoo.tasks import examples
from serve.follower import POLL_S
from tests.http.test_zoo import messages
from tests.served import Served, served

USERS = 280
EXAMPLES = examples("shape", "heldout", 40)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    settings = {
        "engine": {"options": {"max_slots": 4, "max_batch_size": 8}},
        "gateways": {"replicas": 2},
        "experiments": {"look_every_s": 1.0},
    }
    with served(tmp_path_factory.mktemp("story"), settings) as running:
        yield running


@dataclass
class Users:
    """Users who ask once and say whether the answer was right. They ask again where the service was gone."""

    url: str
    model: str
    arms: dict[str, str] = field(default_factory=dict)
    acknowledged: dict[str, bool] = field(default_factory=dict)
    right: Counter[str] = field(default_factory=Counter)
    num_retries: int = 0
    num_unknown: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=60)
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def visit(self, number: int) -> None:
        user, example = f"user-{number}", EXAMPLES[number % len(EXAMPLES)]
        for _ in range(20):
            try:
                raw = self.client.chat.completions.with_raw_response.create(
                    model=self.model, messages=messages(example), user=user, temperature=0, max_tokens=32
                )
            except (openai.APIConnectionError, openai.InternalServerError):
                self.num_retries += 1
                time.sleep(0.5)
                continue
            is_right = raw.parse().choices[0].message.content == example.answer
            with self.lock:
                self.arms.setdefault(user, raw.headers["X-Variant"])
                assert self.arms[user] == raw.headers["X-Variant"], "a user changed arms"
                self.right[raw.headers["X-Variant"]] += is_right
            return self._report(raw.headers["X-Request-Id"], is_right)
        raise AssertionError("the service did not come back")

    def _report(self, request_id: str, is_right: bool) -> None:
        body = {"request_id": request_id, "metric": "solved", "value": is_right, "idempotency_key": "first"}
        for _ in range(20):
            try:
                response = self.http.post("/v1/feedback", json=body)
            except httpx.HTTPError:
                time.sleep(0.5)
                continue
            if response.status_code == 200:
                self.acknowledged[request_id] = is_right
                return
            if response.status_code == 404:  # the request's record was lost with its gateway
                self.num_unknown += 1
                return
            time.sleep(0.5)
        raise AssertionError("the service did not come back")


def gateways(service: Served) -> list[psutil.Process]:
    """Gateway replicas; Ray's processes are children of its raylet, which is the service's."""
    return [p for p in service.family() if "ServeReplica:loom:Gateway" in " ".join(p.cmdline())]


def kept_feedback(service: Served) -> dict[str, bool]:
    """What the registry's file has."""
    database = Path(service.log).parent / "state" / "registry.db"
    engine = sa.create_engine(f"sqlite:///{database}")
    with engine.connect() as connection:
        rows = connection.execute(sa.text("SELECT request_id, value FROM feedback")).all()
    engine.dispose()
    assert len({row.request_id for row in rows}) == len(rows), "a repeated key counted twice"
    return {row.request_id: bool(row.value) for row in rows}


def create(http: httpx.Client, name: str, control: str, treatment: str, **more: object) -> None:
    definition = {
        "name": name,
        "alias": "shapes",
        "arms": [{"name": "control", "target": control}, {"name": "treatment", "target": treatment}],
        "metrics": [{"name": "solved", "kind": "bool"}],
        "decision_metric": "solved",
        "analysis": {"units": USERS},
        **more,
    }
    http.post("/v1/experiments", json=definition).raise_for_status()
    http.post(f"/v1/experiments/{name}/run", json={"reason": "a try"}).raise_for_status()


def test_from_the_first_user_to_the_winner_and_a_guardrail_after_that(service: Served, capsys):
    http = httpx.Client(base_url=service.url, timeout=60)
    create(http, "base-or-skill", BASE_NAME, "shape")
    users = Users(service.url, "shapes")
    with ThreadPoolExecutor(8) as pool:
        visits = [pool.submit(users.visit, number) for number in range(USERS)]
        while len(users.acknowledged) < USERS // 3:
            time.sleep(0.05)
        before_kill = dict(users.acknowledged)
        arms_before = dict(users.arms)
        killed = gateways(service)[0]
        killed.kill()
        for visit in visits:
            visit.result()
    kept = kept_feedback(service)
    assert users.acknowledged.items() <= kept.items() and len(before_kill) >= USERS // 3
    for number in range(0, USERS, 20):  # the gateway that took its place gives everyone the same arm
        users.visit(number)
    assert arms_before.items() <= users.arms.items()
    answer = http.get("/v1/experiments/base-or-skill/results").json()
    found = answer["results"]
    (compared,) = [c for c in found["comparisons"] if c["metric"] == "solved"]
    with capsys.disabled():
        print(
            f"\n{found['units']} users, {len(users.acknowledged)} reports acknowledged, "
            f"{len(users.acknowledged.keys() - kept_feedback(service).keys())} lost with a gateway killed after "
            f"{len(before_kill)}; {users.num_retries} requests tried again, {users.num_unknown} records lost unreported"
            f"\n{ {arm['arm']: (arm['units'], round(arm['means']['solved'], 3)) for arm in found['arms']} }; "
            f"effect {compared['effect']:.3f} in [{compared['low']:.3f}, {compared['high']:.3f}], "
            f"p {compared['p_value']:.2g}; shares p {found['shares']['p_value']:.2g}; winner {found['winner']}"
        )
    assert found["winner"] == "treatment" and not found["shares"]["is_mismatch"]
    assert answer["looks"], "the watch looked by itself"
    for action, body in (("decide", {"arm": "treatment"}), ("promote", {})):
        http.post(f"/v1/experiments/base-or-skill/{action}", json=body).raise_for_status()
    time.sleep(2 * POLL_S)  # the other gateway follows
    example = EXAMPLES[0]
    body = {"model": "shapes", "messages": messages(example), "temperature": 0, "max_tokens": 32}
    for _ in range(6):  # at either gateway
        promoted = http.post("/v1/chat/completions", json=body)
        assert promoted.headers["X-Model-Served"].startswith("shape@") and "X-Experiment" not in promoted.headers
        assert promoted.json()["choices"][0]["message"]["content"] == example.answer

    rail = {"metric": "solved", "tolerance": 0.1, "action": "roll_back"}
    create(http, "worse", "shape", BASE_NAME, guardrails=[rail])
    harmed = Users(service.url, "shapes")
    deadline = time.monotonic() + 60
    with ThreadPoolExecutor(4) as pool:
        for first in range(1000, 3000, 20):
            state = http.get("/v1/experiments/worse").json()["state"]
            if state == "rolled_back":
                break
            assert time.monotonic() < deadline
            try:
                list(pool.map(harmed.visit, range(first, first + 20)))
            except KeyError:  # no X-Variant: it was rolled back meanwhile
                continue
    assert http.get("/v1/experiments/worse").json()["state"] == "rolled_back"
    entry = http.get("/v1/experiments/worse/history").json()["data"][0]
    assert (entry["actor"], entry["action"]) == ("experiments", "experiment.roll_back")
    with capsys.disabled():
        print(f"rolled back by itself after {len(harmed.arms)} users: {entry['details']['reason']}")
    time.sleep(2 * POLL_S)
    after = http.post("/v1/chat/completions", json=body)
    assert after.headers["X-Model-Served"].startswith("shape@") and "X-Experiment" not in after.headers
    assert after.json()["choices"][0]["message"]["content"] == example.answer
