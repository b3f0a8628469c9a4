"""After a soak: everything that was acknowledged, looked for through the API and in the database."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import sqlalchemy as sa

from lora_runtime.zoo.paths import ADAPTERS
from tests.metrics import Scrape
from tests.soak.client import Client
from tests.soak.experimenting import ALIAS, ARMS, EXPERIMENT, PLAIN, Users
from tests.soak.world import Question
from tests.soak.writing import SHOWN

IDLE_S = 30.0
TAKEN: dict[str, dict[str, str]] = {
    "vllm:num_requests_running": {},
    "vllm:num_requests_waiting": {},
    "loom_engine_slots": {"state": "held"},
}
"""Samples of what requests take at an engine."""
MERGED, MERGED_CONTENT = "soak-merged", "shape:1+french:1"
RECIPE = {"name": MERGED, "method": "cat", "inputs": [{"adapter": "shape"}, {"adapter": "french"}]}
MERGE_S = 240.0
PREFIX = "soak-%"
"""Of names in the database, as LIKE has them."""


class Database:
    """The registry's tables, read beside the service."""

    def __init__(self, url: str) -> None:
        self._engine = sa.create_engine(url)

    def rows(self, query: str, **values: Any) -> list[Any]:
        with self._engine.connect() as connection:
            return list(connection.execute(sa.text(query), values))


async def verify(client: Client, database: Database, users: Users, given_up: set[str], merge: str) -> None:
    """Hold the ledger against the service, once all clients have ended. ``given_up``: adapters of whose last change
    nothing is known, since its answer did not come; that is a finding already. ``merge``: the id of a job."""
    await _merged(client, users, merge)
    await _is_idle(client)
    await verify_adapters(client, database, given_up, users.questions)
    _audit(client, database, given_up)
    await _aliases(client, database, users.questions)
    _keys(client, database)
    await _experiment(client, database)
    _pairs(client, database, users)


async def _is_idle(client: Client) -> None:
    """Every place at the engine is returned, also those of clients who left."""
    deadline = time.monotonic() + IDLE_S
    while True:
        response = await client.send("verify", "GET", "/metrics")
        found = Scrape(response.text if response else "")
        taken = {name: found.total(name, **labels) for name, labels in TAKEN.items()}
        busy = {name: value for name, value in taken.items() if value}
        if not busy and all(found.named(name) for name in TAKEN):
            return
        if time.monotonic() > deadline:
            client.tally.find("lost", "verify", f"places that were not returned after {IDLE_S:g} s: {busy}")
            return
        await asyncio.sleep(0.5)


async def verify_adapters(client: Client, database: Database, given_up: set[str], questions: list[Question]) -> None:
    """Every adapter, version and alias is there, answers as it did, and nothing else is."""
    ledger = client.ledger
    response = await client.send("verify", "GET", "/v1/adapters")
    listed = {adapter["id"] for adapter in response.json()["data"]} if response else set()
    _same(client, "adapters", listed - given_up, {*ADAPTERS, MERGED, *ledger.adapters} - given_up)
    versions, aliases = Counter[tuple[str, str]](), dict[tuple[str, str], str]()
    for name, held in ledger.adapters.items():
        if name in given_up:
            continue
        versions.update((name, version) for version in held.versions)
        aliases |= {(name, alias): version for alias, version in held.aliases.items()}
        found = await client.send("verify", "GET", f"/v1/adapters/{name}/versions")
        ids = [version["id"] for version in found.json()["data"]] if found else []
        _same(client, f"versions of {name}", dict(enumerate(ids)), dict(enumerate(held.versions)))
        for version, content in held.versions.items():
            question = client.expected.clear([content], questions)[0]
            await client.ask("verify", f"{name}@{version[:SHOWN]}", question, [content])
    rows = database.rows("SELECT adapter, id FROM versions WHERE adapter LIKE :p", p=PREFIX)
    kept = Counter((row.adapter, row.id) for row in rows if row.adapter not in {*given_up, MERGED})
    _same(client, "rows of versions", kept, versions)
    rows = database.rows("SELECT adapter, name, version FROM aliases WHERE adapter LIKE :p", p=PREFIX)
    kept_aliases = {(r.adapter, r.name): r.version for r in rows if r.adapter not in {*given_up, MERGED}}
    _same(client, "rows of aliases", kept_aliases, aliases)


def _audit(client: Client, database: Database, given_up: set[str]) -> None:
    """The audit has every change of the adapters and model aliases once."""

    def is_known(subject: str) -> bool:
        return subject.split("@")[0] not in {*given_up, MERGED, ALIAS}

    rows = database.rows("SELECT action, subject FROM audit WHERE subject LIKE :p", p=PREFIX)
    kept = Counter((row.action, row.subject) for row in rows if is_known(row.subject))
    due = Counter({key: count for key, count in client.ledger.audit.items() if is_known(key[1])})
    _same(client, "rows of the audit", kept, due)


async def _aliases(client: Client, database: Database, questions: list[Question]) -> None:
    due = {**client.ledger.aliases, ALIAS: PLAIN}
    response = await client.send("verify", "GET", "/v1/aliases")
    listed = {alias["id"] for alias in response.json()["data"]} if response else set()
    _same(client, "model aliases", listed, set(due))
    rows = database.rows("SELECT name FROM model_aliases")
    _same(client, "rows of model aliases", Counter(row.name for row in rows), Counter(list(due)))
    for alias, target in client.ledger.aliases.items():
        await client.ask("verify", alias, client.expected.clear([target], questions)[0], [target])


def _keys(client: Client, database: Database) -> None:
    """Every change that succeeded under an idempotency key can be repeated under it."""
    rows = database.rows("SELECT key FROM idempotency WHERE status IN (200, 201)")
    missing = client.ledger.keys - {row.key for row in rows}
    _same(client, "replies under idempotency keys", missing, set())


async def _experiment(client: Client, database: Database) -> None:
    """Each exposure, request, outcome and report is there once, in the arm that the user was told."""
    ledger = client.ledger
    await asyncio.sleep(1.0)  # five times what the recorder takes to write
    (experiment,) = database.rows("SELECT id FROM experiments WHERE name = :name", name=EXPERIMENT)
    rows = database.rows("SELECT request_id, arm FROM trials WHERE experiment = :id", id=experiment.id)
    trials = {row.request_id: row.arm for row in rows if row.request_id not in ledger.may_be_trials}
    _same(client, "rows of trials", trials, ledger.trials)
    outcomes = {row.request_id: row.status for row in database.rows("SELECT request_id, status FROM outcomes")}
    _same(
        client,
        "rows of outcomes",
        {name: status for name, status in outcomes.items() if name not in ledger.may_be_trials},
        dict.fromkeys(ledger.trials, 200),
    )
    rows = database.rows(
        "SELECT arm, count(*) AS units FROM exposures WHERE experiment = :id GROUP BY arm", id=experiment.id
    )
    arms = Counter(ledger.arms.values())
    _same(client, "exposures by arm", {row.arm: row.units for row in rows}, dict(arms))
    rows = database.rows("SELECT request_id, value FROM feedback")
    _same(client, "rows of feedback", Counter((r.request_id, r.value) for r in rows), Counter(ledger.feedback.items()))
    response = await client.send("verify", "GET", f"/v1/experiments/{EXPERIMENT}/results")
    if response is not None:
        _same(client, "units of the results", response.json()["results"]["units"], arms.total())


def _pairs(client: Client, database: Database, users: Users) -> None:
    """What shadow arms answered is right, and stands beside what the user was answered."""
    for row in database.rows("SELECT request_id, answer, shadow_answer FROM pairs"):
        question = users.asked.get(row.request_id)
        if question is None:
            continue  # its client left
        arm = client.ledger.trials.get(row.request_id)
        due = [client.expected.of(PLAIN if arm is None else ARMS[arm], question)]
        due.append(client.expected.of(ARMS["shadow"], question))
        if [row.answer, row.shadow_answer] != due:
            client.tally.find("wrong", "shadow", f"{row.request_id}: {row.answer!r}, {row.shadow_answer!r}, not {due}")
        client.tally.seconds["shadow"].append(0.0)


async def _merged(client: Client, users: Users, merge: str) -> None:
    """The merge that began with the load has ended well, and answers as its recipe says."""
    deadline = time.monotonic() + MERGE_S
    state, found = "unknown", None
    while state not in ("succeeded", "failed", "cancelled") and time.monotonic() < deadline:
        await asyncio.sleep(1.0)
        found = await client.send("verify", "GET", f"/v1/merges/{merge}")
        state = found.json()["state"] if found else state
    if state != "succeeded":
        client.tally.find("lost", "verify", f"the merge is {state}: {found.json()['error'] if found else ''}")
        return
    await client.ask("verify", MERGED, client.expected.clear([MERGED_CONTENT], users.questions)[0], [MERGED_CONTENT])


def _same(client: Client, what: str, found: Any, due: Any) -> None:
    if found != due:
        more, less = (_without(found, due), _without(due, found)) if hasattr(found, "__iter__") else (found, due)
        client.tally.find("lost", "verify", f"{what}: there is {str(more)[:400]}, due is {str(less)[:400]}")


def _without(one: Any, other: Any) -> Any:
    if isinstance(one, dict):
        return {key: value for key, value in one.items() if other.get(key) != value}
    return one - other
