"""A gateway that cannot read the registry for too long: it says so, and honours no key until it can again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from serve.follower import Follower
from serve.gateway import health
from serve.gateway.errors import install_handlers
from serve.gateway.middleware import IdentityMiddleware
from serve.identity import KeyRing, Scope
from serve.limits import KeyLimits
from serve.registry.database import Database
from serve.registry.errors import RegistryUnavailable
from serve.registry.keys import Keys
from serve.registry.repository import Repository

MAX_AGE_S = 30.0


@dataclass
class Registry:
    """The registry on a database that can be away, and the gateway's clock."""

    database: Database
    is_away: bool = False
    now: float = 0.0
    keys: Keys = field(init=False)

    def __post_init__(self) -> None:
        self.keys = Keys(self.database)

    def revision(self) -> int:
        if self.is_away:
            raise RegistryUnavailable("away")
        return Repository(self.database).revision()


class Engines:
    async def info(self) -> Any:
        return SimpleNamespace(kind="fake")


def gateway(registry: Registry, follower: Follower, *, is_required: bool) -> FastAPI:
    ring = KeyRing(registry.keys.all, is_required=is_required, check_fresh=follower.check_fresh)
    follower.add(ring.reload)
    app = FastAPI()
    services: Any = SimpleNamespace(engines=Engines(), catalog=SimpleNamespace(records={}))
    app.include_router(health.router(services, follower))

    @app.get("/v1/models")
    async def models() -> list[str]:
        return ["base"]

    install_handlers(app)
    app.add_middleware(IdentityMiddleware, keys=ring, limits=KeyLimits("memory://"))
    return app


@pytest.fixture
def registry(url: str) -> Registry:
    return Registry(Database(url))


@pytest.fixture
async def follower(registry: Registry) -> AsyncIterator[Follower]:
    made = Follower(
        registry.revision, snapshot=registry.database.reading, max_age_s=MAX_AGE_S, clock=lambda: registry.now
    )
    yield made
    await made.stop()


def client(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")


async def test_keys_are_honoured_as_long_as_the_view_is_fresh(registry: Registry, follower: Follower):
    key, record = registry.keys.create("team", [Scope.INFER])
    async with client(gateway(registry, follower, is_required=True)) as http:
        headers = {"Authorization": f"Bearer {key}"}
        await follower.refresh()
        assert (await http.get("/v1/models", headers=headers)).status_code == 200
        registry.keys.revoke(record.identity.id)  # and this gateway does not hear of it
        registry.is_away, registry.now = True, MAX_AGE_S
        await follower.catch_up()
        assert (await http.get("/v1/models", headers=headers)).status_code == 200
        assert (await http.get("/readyz")).json()["registry_age_s"] == MAX_AGE_S
        registry.now += 1
        refused = await http.get("/v1/models", headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "registry_stale")
        assert refused.headers["retry-after"] == "5" and "31 s" in refused.json()["error"]["message"]
        ready = await http.get("/readyz")
        assert ready.status_code == 503 and "31 s" in ready.json()["error"]["message"]
        assert (await http.get("/v1/models")).status_code == 401, "no key is no key"
        assert (await http.get("/healthz")).status_code == 200, "it is alive; a restart would not help"
        registry.is_away = False
        await follower.catch_up()
        assert (await http.get("/v1/models", headers=headers)).status_code == 401, "now it is known to be revoked"
        assert (await http.get("/readyz")).status_code == 200


async def test_without_keys_what_was_read_last_serves_on(registry: Registry, follower: Follower):
    async with client(gateway(registry, follower, is_required=False)) as http:
        await follower.refresh()
        registry.is_away, registry.now = True, 10 * MAX_AGE_S
        await follower.catch_up()
        assert (await http.get("/v1/models")).status_code == 200
        assert (await http.get("/readyz")).status_code == 503


async def test_a_gateway_that_never_read_the_registry_honours_no_key(registry: Registry, follower: Follower):
    key, _ = registry.keys.create("team", [Scope.INFER])
    async with client(gateway(registry, follower, is_required=True)) as http:
        refused = await http.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
        assert refused.status_code == 503
