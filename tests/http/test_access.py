"""Who may do what: keys, scopes, limits, uploads and repeated changes, on a service that asks for keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from tests.fakes import EMPTY_TENSORS, write_fake_adapter
from tests.served import Served, served

ASK = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("guarded")
    names = ("support-en", "support-de", "sales")
    for name in names:
        write_fake_adapter(folder / "adapters" / name, name=name)
    settings = {
        "base": {"name": "base"},
        "engine": {"kind": "fake", "options": {"token_s": 0.01}},
        "auth": {"required": True},
        "adapters": {
            "roots": [str(folder / "adapters")],
            "preload": {name: str(folder / "adapters" / name) for name in names},
            "max_bytes": 100_000,
        },
        "store": {"grace_s": 600},
    }
    with served(folder, settings) as running:
        yield running


def loom(guarded: Served, *arguments: str) -> subprocess.CompletedProcess[str]:
    config = guarded.log.parent / "loom.yaml"
    return subprocess.run(
        [sys.executable, "-m", "serve.cli", *arguments, "--config", str(config)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    )


def key(guarded: Served, *options: str) -> str:
    """A key that gateways know by now."""
    made = loom(guarded, "keys", "create", "someone", *options).stdout.strip()
    deadline = time.monotonic() + 5
    while httpx.get(f"{guarded.url}/v1/models", headers=bearer(made)).status_code == 401:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return made


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def managing(guarded: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guarded.url, headers=bearer(key(guarded, "-s", "adapters")), timeout=60) as client:
        yield client


def test_without_a_key_there_is_health_and_nothing_else(guarded: Served):
    for headers in ({}, {"Authorization": "Bearer nonsense"}, {"Authorization": "Basic x"}):
        for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("POST", "/v1/adapters")):
            refused = httpx.request(method, guarded.url + path, headers=headers)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
            assert refused.json()["error"]["type"] == "authentication_error"
    assert httpx.get(f"{guarded.url}/healthz").status_code == httpx.get(f"{guarded.url}/readyz").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="unused", max_retries=0).models.list()


def test_the_sample_requests_send_the_key(guarded: Served):
    assert '-H "Authorization: Bearer $LOOM_API_KEY"' in guarded.log.read_text()


def test_scopes_and_names_bound_what_a_key_reaches(guarded: Served):
    infer = key(guarded, "-s", "infer", "-a", "support-*")
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=infer, max_retries=0)
    assert [model.id for model in client.models.list()] == ["base", "support-de", "support-en"]
    assert client.chat.completions.create(model="support-en:2+support-de", **ASK).choices
    assert client.chat.completions.create(model="base", **ASK).choices
    for model in ("sales", "support-en+sales", "nonsense"):
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model=model, **ASK)
        assert "Did you mean" not in missing.value.message
    for path in ("adapters", "audit", "adapters/support-en"):
        refused = httpx.get(f"{guarded.url}/v1/{path}", headers=bearer(infer))
        assert refused.status_code == 403 and refused.json()["error"]["type"] == "permission_error"
    team = bearer(key(guarded, "-s", "adapters", "-a", "support-*"))
    assert [a["id"] for a in httpx.get(f"{guarded.url}/v1/adapters", headers=team).json()["data"]] == [
        "support-de", "support-en"
    ]  # fmt: skip
    for method, path, body in (
        ("DELETE", "adapters/sales", None),
        ("PUT", "adapters/sales/aliases/prod", {"version": "latest"}),
        ("POST", "adapters", {"name": "sales", "path": "/x"}),
        ("POST", "load_lora_adapter", {"lora_name": "sales", "lora_path": "/x"}),
        ("POST", "unload_lora_adapter", {"lora_name": "sales"}),
        ("POST", "chat/completions", {"model": "base", **ASK}),
        ("POST", "store/collect", None),
    ):
        assert httpx.request(method, f"{guarded.url}/v1/{path}", json=body, headers=team).status_code == 403, path
    assert httpx.put(
        f"{guarded.url}/v1/adapters/support-en/aliases/prod", json={"version": "latest"}, headers=team
    ).is_success


def test_changes_are_signed_in_the_audit(guarded: Served, managing: httpx.Client):
    assert managing.put("/v1/adapters/sales/aliases/signed", json={"version": "latest"}).is_success
    admin = bearer(key(guarded, "-s", "admin"))
    entries = httpx.get(f"{guarded.url}/v1/audit", headers=admin).json()["data"]
    moved = next(entry for entry in entries if entry["subject"] == "sales@signed")
    made = managing.headers["authorization"].split("_")[1]
    assert moved["actor"] == f"someone ({made})"
    assert all("loom_" not in json.dumps(entry) for entry in entries)


def test_revoked_keys_end_within_seconds(guarded: Served):
    made = key(guarded, "-s", "infer")
    assert made.split("_")[1] in loom(guarded, "keys", "ls").stdout and made not in loom(guarded, "keys", "ls").stdout
    loom(guarded, "keys", "revoke", made.split("_")[1])
    time.sleep(1.5)
    assert httpx.get(f"{guarded.url}/v1/models", headers=bearer(made)).status_code == 401


def test_a_key_over_its_limits_is_told_when_to_return_and_others_are_served(guarded: Served):
    limited = bearer(key(guarded, "-s", "infer", "--concurrent", "2"))
    other = bearer(key(guarded, "-s", "infer"))
    slow = {"model": "base", **ASK, "max_tokens": 100}

    def ask(headers: dict[str, str]) -> httpx.Response:
        return httpx.post(f"{guarded.url}/v1/chat/completions", json=slow, headers=headers, timeout=30)

    with ThreadPoolExecutor(12) as pool:
        mine, theirs = ([pool.submit(ask, headers) for _ in range(6)] for headers in (limited, other))
        statuses = sorted(one.result().status_code for one in mine)
        assert statuses == [200, 200, 429, 429, 429, 429]
        assert {one.result().status_code for one in theirs} == {200}
    refused = [one.result() for one in mine if one.result().status_code == 429]
    assert all(int(one.headers["retry-after"]) >= 1 for one in refused)
    assert ask(limited).status_code == 200, "what ended makes room"
    rated = bearer(key(guarded, "-s", "infer", "--per-minute", "3"))
    statuses = [httpx.get(f"{guarded.url}/v1/models", headers=rated).status_code for _ in range(4)]
    assert statuses == [200, 200, 200, 429] or statuses == [200, 200, 429, 429], "making sure it is known counts too"


def upload(client: httpx.Client, name: str, files: dict[str, bytes], **data: str) -> httpx.Response:
    return client.post(
        f"/v1/adapters/{name}/versions",
        files=[("files", (file, content)) for file, content in files.items()],
        data=data,
    )


CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def test_an_upload_is_examined_and_registered(guarded: Served, managing: httpx.Client):
    files = {CONFIG: b'{"name": "up"}', TENSORS: EMPTY_TENSORS}
    first = upload(managing, "up", files)
    assert (first.status_code, first.json()["num_versions"]) == (201, 1)
    assert upload(managing, "up", files).status_code == 200
    second = upload(managing, "up", {**files, CONFIG: b'{"name": "up2"}'}, activate="false")
    assert (second.status_code, second.json()["num_versions"]) == (201, 2)
    assert second.json()["version"] == first.json()["version"]
    assert managing.get("/v1/adapters/up/versions").json()["data"][0]["source"] == "upload"
    infer = bearer(key(guarded, "-s", "infer"))
    ask = {"model": "up", **ASK}
    assert httpx.post(f"{guarded.url}/v1/chat/completions", json=ask, headers=infer).status_code == 200


@pytest.mark.parametrize(
    ("files", "data", "status", "said"),
    [
        ({CONFIG: b"{}"}, {}, 400, "lacks the file adapter_model.safetensors"),
        ({TENSORS: EMPTY_TENSORS}, {}, 400, "lacks the file adapter_config.json"),
        ({CONFIG: b"{", TENSORS: EMPTY_TENSORS}, {}, 400, "not valid JSON"),
        ({CONFIG: b"{}", TENSORS: EMPTY_TENSORS, "evil.py": b"x"}, {}, 400, "no file of an adapter"),
        ({CONFIG: b"{}", "../adapter_model.safetensors": b"x"}, {}, 400, "no file of an adapter"),
        ({CONFIG: b"{}", TENSORS: EMPTY_TENSORS}, {"activate": "maybe"}, 400, "true or false"),
        ({CONFIG: b"{}", TENSORS: EMPTY_TENSORS}, {"other": "x"}, 400, "takes the field"),
        ({CONFIG: b"{}", TENSORS: b"x" * 200_000}, {}, 413, "larger than 100000 bytes"),
    ],
)
def test_what_is_wrong_with_an_upload_is_said(managing: httpx.Client, guarded: Served, files, data, status, said):
    refused = upload(managing, "wrong", files, **data)
    assert (refused.status_code, said in refused.json()["error"]["message"]) == (status, True), refused.text
    assert managing.get("/v1/adapters/wrong").status_code == 404
    assert left_behind(guarded) == []


def left_behind(guarded: Served) -> list[Path]:
    store = guarded.log.parent / "state" / "store"
    return [path for folder in ("incoming", "staging") for path in (store / folder).glob("*")]


def test_an_upload_without_a_length_is_bounded_too(managing: httpx.Client, guarded: Served):
    def endless() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="adapter_model.safetensors"\r\n\r\n'
        for _ in range(100):
            yield b"x" * 10_000

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    refused = managing.post("/v1/adapters/endless/versions", content=endless(), headers=headers)
    assert refused.status_code == 413
    for broken in (b"", b"--y\r\n", b"--x\r\nnonsense"):
        assert managing.post("/v1/adapters/endless/versions", content=broken, headers=headers).status_code == 400
    assert managing.post("/v1/adapters/endless/versions", json={}).status_code == 400
    assert left_behind(guarded) == []


def test_a_change_that_is_sent_twice_happens_once(guarded: Served, managing: httpx.Client):
    folder = write_fake_adapter(guarded.log.parent / "adapters" / "twice", name="twice")
    body = {"name": "twice", "path": str(folder)}
    first = managing.post("/v1/adapters", json=body, headers={"Idempotency-Key": "k1"})
    again = managing.post("/v1/adapters", json=body, headers={"Idempotency-Key": "k1"})
    assert (first.status_code, again.status_code) == (201, 201) and first.content == again.content
    assert again.headers["idempotent-replayed"] == "true" and "idempotent-replayed" not in first.headers
    other = managing.post("/v1/adapters", json={**body, "activate": False}, headers={"Idempotency-Key": "k1"})
    assert other.status_code == 400 and "another request" in other.json()["error"]["message"]
    for deleting in range(2):
        gone = managing.delete("/v1/adapters/twice", headers={"Idempotency-Key": "k2"})
        assert gone.status_code == 200, deleting
    assert managing.delete("/v1/adapters/twice").status_code == 404
    failed = managing.delete("/v1/adapters/twice", headers={"Idempotency-Key": "k3"})
    assert failed.status_code == 404
    assert managing.post("/v1/adapters", json=body).status_code == 201
    assert managing.delete("/v1/adapters/twice", headers={"Idempotency-Key": "k3"}).status_code == 200
    assert managing.delete("/v1/adapters/x", headers={"Idempotency-Key": "a b"}).status_code == 400


def test_many_who_send_the_same_change_at_once_hear_the_same(guarded: Served, managing: httpx.Client):
    folder = write_fake_adapter(guarded.log.parent / "adapters" / "many", name="many")
    body = {"name": "many", "path": str(folder)}

    def send(_: int) -> int:
        return managing.post("/v1/adapters", json=body, headers={"Idempotency-Key": "many"}).status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(send, range(16)))
    assert statuses.count(201) >= 1 and set(statuses) <= {201, 409}
    assert managing.get("/v1/adapters/many").json()["num_versions"] == 1


def test_who_may_experiment_and_report(guarded: Served):
    experimenting, infer, other = (
        httpx.Client(base_url=guarded.url, headers=bearer(key(guarded, *options)), timeout=60)
        for options in (
            ("-s", "experiments", "-a", "support-*"),
            ("-s", "infer", "-a", "support-*"),
            ("-s", "infer"),
        )
    )
    arms = [{"name": "control", "target": "support-en"}, {"name": "treatment", "target": "support-de"}]
    definition = {"name": "support-language", "alias": "support-any", "arms": arms, "metrics": [{"name": "solved"}]}
    assert infer.post("/v1/experiments", json=definition).status_code == 403
    assert infer.put("/v1/aliases/support-x", json={"target": "base"}).status_code == 403
    for beyond, status in (
        ({"alias": "sales-any"}, 403),
        ({"name": "language"}, 403),
        ({"arms": [arms[0], {"name": "treatment", "target": "sales"}]}, 404),
    ):
        assert experimenting.post("/v1/experiments", json=definition | beyond).status_code == status
    experimenting.post("/v1/experiments", json=definition).raise_for_status()
    experimenting.post("/v1/experiments/support-language/run", json={}).raise_for_status()
    assert other.get("/v1/experiments/support-language").status_code == 403
    ask = {"model": "support-any", "prompt": "hi", "user": "u"}
    answer = infer.post("/v1/completions", json=ask)
    assert answer.headers["X-Assignment"] == "hash"
    assert "support-any" in [model["id"] for model in infer.get("/v1/models").json()["data"]]
    forced = infer.post("/v1/completions", json=ask, headers={"X-Force-Variant": "treatment"})
    assert forced.status_code == 403 and "'experiments'" in forced.json()["error"]["message"]
    report = {"request_id": answer.headers["X-Request-Id"], "metric": "solved", "value": True}
    assert other.post("/v1/feedback", json=report).status_code == 404, "another key's request"
    assert infer.post("/v1/feedback", json=report).json()["counts"] is True
    again = experimenting.post("/v1/feedback", json={**report, "idempotency_key": "judge"})
    assert again.status_code == 200, "who runs the experiment may report for all"
    by_tenant = {"attribute": "tenant", "any_of": ["somebody else"]}
    narrowed = {"conditions": [by_tenant], "new_phase": True}
    changed = experimenting.patch("/v1/experiments/support-language", json=narrowed)
    assert changed.status_code == 200
    assert infer.post("/v1/completions", json=ask).headers["X-Assignment"] == "not_enrolled"
    experimenting.post("/v1/experiments/support-language/roll_back", json={}).raise_for_status()
    entry = experimenting.get("/v1/experiments/support-language/history").json()["data"][0]
    assert entry["actor"].startswith("someone ("), "the history names the key"


def test_who_may_merge(guarded: Served):
    """Those with the scope, what they reach, into names that they reach; others' merges are not there for them."""
    recipe = {"name": "support-both", "method": "cat", "inputs": [{"adapter": "support-en"}, {"adapter": "support-de"}]}
    refused = httpx.post(f"{guarded.url}/v1/merges", json=recipe, headers=bearer(key(guarded, "-s", "infer")))
    assert refused.status_code == 403 and "'merges'" in refused.json()["error"]["message"]
    team = bearer(key(guarded, "-s", "merges", "-a", "support-*"))

    def asked(**change: object) -> httpx.Response:
        return httpx.post(f"{guarded.url}/v1/merges", json=recipe | change, headers=team, timeout=60)

    assert asked(name="sales-both").status_code == 403
    beyond = asked(inputs=[{"adapter": "support-en"}, {"adapter": "sales"}]).json()["error"]["message"]
    assert "no model or adapter 'sales'" in beyond
    fake = asked()
    assert fake.status_code == 400 and "no base to merge into" in fake.json()["error"]["message"]
    assert httpx.get(f"{guarded.url}/v1/merges", headers=team).json()["data"] == []
    assert httpx.get(f"{guarded.url}/v1/checkpoints", headers=team).json()["data"] == []
    assert httpx.get(f"{guarded.url}/v1/checkpoints/sales", headers=team).status_code == 403
