"""The service around the answers: adapters' registry, health, back-pressure, disconnects."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.fakes import write_fake_adapter
from tests.metrics import eventually, scrape
from tests.served import METRICS_S, Served

SLOW = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 300}


def test_health(http: httpx.Client):
    assert http.get("/healthz").json() == {"status": "ok"}
    assert http.get("/readyz").json()["status"] == "ready"


def test_request_ids_come_back(http: httpx.Client):
    assert http.get("/healthz", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = http.post("/v1/chat/completions", json={**SLOW, "max_tokens": 1})
    assert re.fullmatch(r"chatcmpl-[A-Za-z0-9._-]{1,128}", made.json()["id"])
    assert made.headers["x-request-id"] == made.json()["id"].removeprefix("chatcmpl-")
    odd = http.post("/v1/chat/completions", json={**SLOW, "max_tokens": 1}, headers={"X-Request-Id": "a b/c"})
    assert odd.status_code == 400 and odd.json()["error"]["param"].lower() == "x-request-id"


def test_answers_name_what_served_them(http: httpx.Client):
    response = http.post("/v1/chat/completions", json={**SLOW, "model": "french:2+shape", "max_tokens": 2})
    served = r"french@[0-9a-f]{12}:2\.0\+shape@[0-9a-f]{12}"
    assert re.fullmatch(served, response.headers["x-model-served"])


def test_adapters_come_and_go(http: httpx.Client, adapter_root):
    folder = write_fake_adapter(adapter_root / "late", name="late")
    body = {"name": "late", "path": str(folder)}
    created = http.post("/v1/adapters", json=body)
    assert created.status_code == 201
    assert re.fullmatch(r"[0-9a-f]{64}", created.json()["version"])
    assert http.post("/v1/adapters", json=body).status_code == 200
    assert "late" in [adapter["id"] for adapter in http.get("/v1/adapters").json()["data"]]
    ask = {**SLOW, "max_tokens": 2, "model": f"late@{created.json()['version'][:8]}"}
    assert http.post("/v1/chat/completions", json=ask).status_code == 200
    write_fake_adapter(folder, name="other")
    changed = http.post("/v1/adapters", json=body)
    assert (changed.status_code, changed.json()["num_versions"]) == (201, 2)
    assert http.delete("/v1/adapters/late").json()["deleted"] is True
    assert http.get("/v1/adapters/late").status_code == 404
    assert http.post("/v1/chat/completions", json={**SLOW, "model": "late"}).status_code == 404


def test_classification(http: httpx.Client):
    answer = http.post("/v1/classify", json={"model": "animals", "input": "a b"}).json()
    assert answer["data"][0]["label"] == "yes"
    assert [score["label"] for score in answer["data"][0]["scores"]] == ["no", "yes"]
    assert http.post("/v1/classify", json={"model": "base", "input": "a"}).status_code == 404
    both = {"model": "animals", "input": "a", "messages": [{"role": "user", "content": "b"}]}
    assert http.post("/v1/classify", json=both).status_code == 400


def test_clients_that_leave_free_their_places(fake: Served):
    """The request is cancelled in the engine, which would take three seconds to finish it."""
    time.sleep(3 * METRICS_S)  # what other tests have cancelled is counted by then
    before = scrape(fake.url)
    request = {"json": {**SLOW, "stream": True}, "timeout": 30}
    with httpx.stream("POST", f"{fake.url}/v1/chat/completions", **request) as response:
        assert response.status_code == 200
        next(response.iter_lines())
    cancelled, finished = "loom_engine_cancelled_total", "loom_engine_finished_total"
    after = eventually(fake.url, lambda found: found.total(cancelled) > before.total(cancelled))
    assert after.total(cancelled) == before.total(cancelled) + 1
    assert after.total(finished) == before.total(finished)
    eventually(fake.url, lambda found: found.total("vllm:num_requests_running") == 0)


def test_too_many_requests_are_told_when_to_return(fake: Served):
    def ask(_: int) -> httpx.Response:
        return httpx.post(f"{fake.url}/v1/chat/completions", json={**SLOW, "max_tokens": 150}, timeout=60)

    with ThreadPoolExecutor(40) as pool:
        responses = list(pool.map(ask, range(40)))
    statuses = {response.status_code for response in responses}
    assert statuses == {200, 429}
    refused = [response for response in responses if response.status_code == 429]
    assert all(int(response.headers["retry-after"]) >= 1 for response in refused)
    assert all(response.json()["error"]["type"] == "rate_limit_error" for response in refused)


def test_the_description_of_the_api_is_served(http: httpx.Client):
    described = http.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/classify", "/v1/adapters", "/v1/models"} <= set(described["paths"])
    assert "shape:0.7+french:0.3" in json.dumps(described)


def test_the_gateway_process_never_imports_torch():
    import subprocess
    import sys

    code = "import sys, serve.app, serve.gateway.app, serve.catalog, serve.targets; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
