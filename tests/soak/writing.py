"""Clients that change what there is: registrations, aliases, deletions. Each owns its names and knows what is due."""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx

from lora_runtime.folder import CONFIG_NAME, TENSORS_NAME
from tests.soak.client import Client
from tests.soak.ledger import Held, Meaning
from tests.soak.world import COMBINATIONS, CONTENTS, Copy, Question

LATEST = "latest"
ALIASES = ("prod", "canary")
SHOWN = 12
MAX_VERSIONS = 4
NAMES_EACH = 3
REPEATS_S = 30.0


class Unacknowledged(Exception):
    """A change had no answer that says what came of it; its finding is counted already."""


@dataclass(slots=True)
class Writer:
    """Changes its own adapters and model aliases, one change after another, and checks each at once."""

    client: Client
    questions: list[Question]
    copies: list[Copy]
    random: Random
    number: int
    is_lost: set[str] = field(default_factory=set)
    """Names of whose state nothing is known any more."""

    async def writes(self) -> None:
        while self.client.goes_on:
            name = f"soak-{self.number}-{self.random.randrange(NAMES_EACH)}"
            if name not in self.is_lost:
                try:
                    await self._change(name)
                except Unacknowledged:
                    self.is_lost.add(name)
            await asyncio.sleep(self.random.uniform(0.0, 0.2))

    async def _change(self, name: str) -> None:
        held = self.client.ledger.adapters.get(name)
        if held is None or (len(held.versions) < 2 and self.random.random() < 0.7):
            await self._register(name)
            return
        unnamed = set(held.versions) - set(held.aliases.values())
        do = self.random.choices(
            (self._register, self._move, self._delete_alias, self._delete_version, self._delete, self._move_model),
            (3 if len(held.versions) < MAX_VERSIONS else 0, 3, 1, 3 if unnamed else 0, 0.7, 2),
        )[0]
        await do(name)

    async def _register(self, name: str) -> None:
        """By path or by upload, with an idempotency key or without, sent once, twice, at once, or after giving up."""
        copy, activate = self.random.choice(self.copies), self.random.random() < 0.7
        held = self.client.ledger.adapters.get(name)
        moves = held is None or activate
        meant: dict[str, Meaning] = {f"{name}@{copy.version[:SHOWN]}": copy.content}
        if moves:
            meant |= {name: copy.content, f"{name}@{LATEST}": copy.content}
        key = uuid.uuid4().hex
        send = self._by_upload if self.random.random() < 0.4 else self._by_path
        with self.client.ledger.meanings.changing(meant):
            way = self.random.choice((self._once, self._repeated, self._at_once, self._given_up))
            answer = await way(send, name, copy, activate, key)
        if answer["version"] != (copy.version if moves else (held or Held()).aliases[LATEST]):
            self.client.tally.find("wrong", "register", f"{name}: {answer['version']}, sent {copy.version}")
        self._registered(name, copy, moves)
        await self._check(name, copy.version)

    async def _once(self, send: Any, name: str, copy: Copy, activate: bool, key: str) -> dict[str, Any]:
        return self._json(await send(name, copy, activate, key, (200, 201)))

    async def _repeated(self, send: Any, name: str, copy: Copy, activate: bool, key: str) -> dict[str, Any]:
        first = self._json(await send(name, copy, activate, key, (200, 201)))
        again = await send(name, copy, activate, key, (200, 201))
        if self._json(again) != first or again.headers.get("Idempotent-Replayed") != "true":
            self.client.tally.find("wrong", "register", f"{name}: a repeated key did not answer the same")
        return first

    async def _at_once(self, send: Any, name: str, copy: Copy, activate: bool, key: str) -> dict[str, Any]:
        """Two requests of one key at once: one is carried out; the other answers the same, or is told to wait."""
        both = await asyncio.gather(*(send(name, copy, activate, key, (200, 201, 409)) for _ in range(2)))
        answers: list[dict[str, Any]] = [
            response.json() for response in both if response is not None and response.is_success
        ]
        if not answers or any(answer != answers[0] for answer in answers):
            self.client.tally.find("wrong", "register", f"{name}: one key at once answered {answers}")
            raise Unacknowledged
        return answers[0]

    async def _given_up(self, send: Any, name: str, copy: Copy, activate: bool, key: str) -> dict[str, Any]:
        """The client leaves before the answer, and asks again with the same key until there is one."""
        request = asyncio.create_task(send(name, copy, activate, key, (200, 201)))
        await asyncio.wait({request}, timeout=self.random.uniform(0.005, 0.1))
        request.cancel()
        with suppress(asyncio.CancelledError):
            await request
        self.client.tally.leave("register")
        deadline = time.monotonic() + REPEATS_S
        while time.monotonic() < deadline:
            again = await send(name, copy, activate, key, (200, 201, 409))
            if again is None or again.is_success:
                return self._json(again)
            await asyncio.sleep(0.2)
        self.client.tally.find(
            "hung", "register", f"{name}: its key stays taken, {REPEATS_S:g} s and more"
        )
        raise Unacknowledged

    async def _by_path(
        self, name: str, copy: Copy, activate: bool, key: str, due: tuple[int, ...]
    ) -> httpx.Response | None:
        body = {"name": name, "path": str(copy.folder), "activate": activate}
        return await self._send("register", "POST", "/v1/adapters", key, due=due, json=body)

    async def _by_upload(
        self, name: str, copy: Copy, activate: bool, key: str, due: tuple[int, ...]
    ) -> httpx.Response | None:
        files = [("files", (part, (copy.folder / part).read_bytes())) for part in (CONFIG_NAME, TENSORS_NAME)]
        path, data = f"/v1/adapters/{name}/versions", {"activate": str(activate).lower()}
        # Requests of one key must be equal, and a form's boundary is part of what is sent.
        kind = {"Content-Type": f"multipart/form-data; boundary={key}"}
        return await self._send("upload", "POST", path, key, due=due, files=files, data=data, headers=kind)

    async def _move(self, name: str) -> None:
        held = self.client.ledger.adapters[name]
        alias = self.random.choice((LATEST, *ALIASES))
        version = self.random.choice(list(held.versions))
        meant: dict[str, Meaning] = {f"{name}@{alias}": held.versions[version]}
        if alias == LATEST:
            meant[name] = held.versions[version]
        with self.client.ledger.meanings.changing(meant):
            path = f"/v1/adapters/{name}/aliases/{alias}"
            body = {"version": version[: self.random.choice((SHOWN, 64))]}
            self._json(await self._send("alias", "PUT", path, json=body))
        self._moved(name, alias, version)
        await self._check(name, version)

    async def _delete_alias(self, name: str) -> None:
        held = self.client.ledger.adapters[name]
        there = [alias for alias in ALIASES if alias in held.aliases]
        if not there:
            return
        alias = self.random.choice(there)
        with self.client.ledger.meanings.changing({f"{name}@{alias}": None}):
            self._json(await self._send("delete alias", "DELETE", f"/v1/adapters/{name}/aliases/{alias}"))
        del held.aliases[alias]
        self.client.ledger.audit["alias.delete", f"{name}@{alias}"] += 1

    async def _delete_version(self, name: str) -> None:
        held = self.client.ledger.adapters[name]
        version = self.random.choice([found for found in held.versions if found not in held.aliases.values()])
        with self.client.ledger.meanings.changing({f"{name}@{version[:SHOWN]}": None}):
            self._json(await self._send("delete version", "DELETE", f"/v1/adapters/{name}/versions/{version}"))
        del held.versions[version]
        self.client.ledger.audit["version.delete", f"{name}@{version}"] += 1

    async def _delete(self, name: str) -> None:
        held = self.client.ledger.adapters[name]
        spellings = [name, *(f"{name}@{part}" for part in (*held.aliases, *(v[:SHOWN] for v in held.versions)))]
        with self.client.ledger.meanings.changing(dict.fromkeys(spellings)):
            self._json(await self._send("delete adapter", "DELETE", f"/v1/adapters/{name}"))
        del self.client.ledger.adapters[name]
        self.client.ledger.audit["adapter.delete", name] += 1

    async def _move_model(self, name: str) -> None:
        """A model alias, moved or deleted. It means content of the demo, which nothing here deletes."""
        alias, ledger = f"soak-model-{self.number}", self.client.ledger
        if alias in ledger.aliases and self.random.random() < 0.4:
            with ledger.meanings.changing({alias: None}):
                self._json(await self._send("model alias", "DELETE", f"/v1/aliases/{alias}"))
            del ledger.aliases[alias]
            ledger.audit["model.delete", alias] += 1
            return
        target = self.random.choice((*CONTENTS, *COMBINATIONS))
        with ledger.meanings.changing({alias: target}):
            self._json(await self._send("model alias", "PUT", f"/v1/aliases/{alias}", json={"target": target}))
        if ledger.aliases.get(alias) != target:
            ledger.audit["model.move", alias] += 1
        ledger.aliases[alias] = target

    async def _check(self, name: str, version: str) -> None:
        """What was acknowledged is there at once, and is what answers."""
        held = self.client.ledger.adapters[name]
        shown = await self.client.send("read back", "GET", f"/v1/adapters/{name}")
        if shown is not None and (shown.json()["aliases"], shown.json()["num_versions"]) != (
            held.aliases,
            len(held.versions),
        ):
            self.client.tally.find("lost", "read back", f"{name}: {shown.json()}, acknowledged {held}")
        clear = self.client.expected.clear(CONTENTS, self.questions)
        model = self.random.choice((name, f"{name}@{version[:SHOWN]}", f"{name}@{version}"))
        meant = held.versions[held.aliases[LATEST] if model == name else version]
        await self.client.ask("read back", model, self.random.choice(clear), [meant])

    def _registered(self, name: str, copy: Copy, moves: bool) -> None:
        ledger = self.client.ledger
        held = ledger.adapters.setdefault(name, Held())
        if copy.version not in held.versions:
            ledger.audit["adapter.register", f"{name}@{copy.version}"] += 1
        held.versions.setdefault(copy.version, copy.content)
        if moves:
            self._moved(name, LATEST, copy.version)

    def _moved(self, name: str, alias: str, version: str) -> None:
        held = self.client.ledger.adapters[name]
        if held.aliases.get(alias) != version:
            self.client.ledger.audit["alias.move", f"{name}@{alias}"] += 1
        held.aliases[alias] = version

    async def _send(
        self, activity: str, method: str, path: str, key: str = "", *, due: tuple[int, ...] = (200, 201), **request: Any
    ) -> httpx.Response | None:
        headers = {**request.pop("headers", {}), **({"Idempotency-Key": key} if key else {})}
        response = await self.client.send(activity, method, path, due=due, headers=headers, **request)
        if key and response is not None and response.is_success:
            self.client.ledger.keys.add(key)
        return response

    @staticmethod
    def _json(response: httpx.Response | None) -> dict[str, Any]:
        if response is None:
            raise Unacknowledged
        answer: dict[str, Any] = response.json()
        return answer
