"""A service whose registry falls silent: keys are honoured for ``registry.max_age_s`` and no longer, and all of it ends
by itself. The database is PostgreSQL behind a proxy that stalls, which is harder than one that refuses connections."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import pytest
from sqlalchemy.engine import make_url

from serve.identity import Scope
from serve.registry.database import Database
from serve.registry.keys import Keys
from tests.served import Served, served
from tests.unit.serve.conftest import new_database
from tests.unit.serve.proxies import Proxy, proxy

pytestmark = pytest.mark.slow

MAX_AGE_S = 4.0
BODY = {"model": "base", "prompt": "hello", "max_tokens": 1}


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with new_database() as url:
        yield url


@pytest.fixture(scope="module")
def between(database: str) -> Iterator[Proxy]:
    found = make_url(database)
    with proxy(str(found.host), found.port or 5432) as made:
        yield made


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, database: str, between: Proxy) -> Iterator[Served]:
    through = make_url(database).set(host="127.0.0.1", port=between.port)
    settings = {
        "base": {"name": "base"},
        "engine": {"kind": "fake"},
        "engines": {"num_cpus": 0.5},
        "adapters": {"preload": {}},
        "auth": {"required": True},
        "registry": {"url": through.render_as_string(hide_password=False), "max_age_s": MAX_AGE_S},
    }
    with served(tmp_path_factory.mktemp("outage"), settings) as running:
        yield running


def ask(service: Served, key: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{service.url}/v1/completions", json=BODY, headers=headers, timeout=30)


def within(seconds: float, service: Served, key: str, status: int) -> httpx.Response:
    """The first answer with ``status``."""
    ends = time.monotonic() + seconds
    while (answer := ask(service, key)).status_code != status:
        assert time.monotonic() < ends, f"still {answer.status_code} after {seconds} s: {answer.text}"
        time.sleep(0.1)
    return answer


def test_a_revoked_key_is_honoured_no_longer_than_the_stated_age(service: Served, database: str, between: Proxy):
    keys = Keys(Database(database))
    (good, _), (bad, revoked) = keys.create("good", [Scope.INFER]), keys.create("bad", [Scope.INFER])
    for key in (good, bad):
        within(30, service, key, 200)
    between.stall()
    since = time.monotonic()
    keys.revoke(revoked.identity.id)
    refused = within(MAX_AGE_S + 20, service, bad, 503)
    assert time.monotonic() - since > MAX_AGE_S - 1, "until then it may be honoured"
    assert refused.json()["error"]["code"] == "registry_stale" and refused.headers["retry-after"] == "5"
    assert ask(service, good).status_code == 503
    ready = httpx.get(f"{service.url}/readyz", timeout=30)
    assert ready.status_code == 503 and "registry.max_age_s" in ready.json()["error"]["message"]
    assert httpx.get(f"{service.url}/healthz", timeout=30).status_code == 200
    between.flow()
    within(60, service, bad, 401)
    within(60, service, good, 200)
    assert httpx.get(f"{service.url}/readyz", timeout=30).status_code == 200
