"""Versions and aliases of adapters: what each name means, and that it moves for new requests only."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from lora_runtime.zoo.paths import ADAPTERS
from lora_runtime.zoo.tasks import examples
from tests.fakes import write_fake_adapter
from tests.http.test_zoo import is_right
from tests.served import Served


@pytest.fixture(scope="module")
def demo(zoo: Served):
    with httpx.Client(base_url=zoo.url, timeout=120) as client:
        yield client


def register(http: httpx.Client, name: str, path: Path, **more: object) -> httpx.Response:
    return http.post("/v1/adapters", json={"name": name, "path": str(path), **more})


def alias(http: httpx.Client, name: str, alias: str, version: str) -> httpx.Response:
    return http.put(f"/v1/adapters/{name}/aliases/{alias}", json={"version": version})


def test_each_name_means_its_version(demo: httpx.Client):
    shape, french = (examples(task, "heldout", 1)[0] for task in ("shape", "french"))
    first = register(demo, "skill", ADAPTERS["shape"])
    assert (first.status_code, first.json()["num_versions"]) == (201, 1)
    second = register(demo, "skill", ADAPTERS["french"], activate=False)
    assert (second.status_code, second.json()["num_versions"]) == (201, 2)
    assert second.json()["version"] == first.json()["version"]
    old, new = demo.get("/v1/adapters/skill/versions").json()["data"]
    assert (old["number"], old["aliases"], new["number"], new["aliases"]) == (1, ["latest"], 2, [])
    assert is_right(demo, "skill", "shape", shape) and is_right(demo, f"skill@{new['id'][:8]}", "french", french)
    assert alias(demo, "skill", "canary", new["id"][:8]).json()["aliases"]["canary"] == new["id"]
    assert is_right(demo, "skill@canary", "french", french)
    assert demo.get("/v1/adapters/skill/versions/canary").json()["number"] == 2
    assert alias(demo, "skill", "latest", "canary").json()["version"] == new["id"]
    assert is_right(demo, "skill", "french", french) and not is_right(demo, "skill", "shape", shape)
    assert demo.delete(f"/v1/adapters/skill/versions/{new['id']}").status_code == 409
    assert demo.delete(f"/v1/adapters/skill/versions/{old['id'][:10]}").json()["id"] == f"skill@{old['id']}"
    gone = demo.post(
        "/v1/chat/completions",
        json={"model": f"skill@{old['id'][:8]}", "messages": [{"role": "user", "content": "hi"}]},
    )
    assert gone.status_code == 404 and "skill@canary" in gone.json()["error"]["message"]
    assert demo.delete("/v1/adapters/skill/aliases/canary").status_code == 200
    assert demo.delete("/v1/adapters/skill/aliases/latest").status_code == 409
    assert demo.delete("/v1/adapters/skill").status_code == 200


@pytest.mark.parametrize(
    ("name", "version", "status", "said"),
    [
        ("prod", "feed", 404, "no version or alias 'feed'"),
        ("beef", "latest", 400, "hexadecimal"),
        ("pr%20od", "latest", 400, "cannot be an alias"),
        ("prod", "", 400, "version"),
    ],
)
def test_aliases_that_cannot_be(http: httpx.Client, name: str, version: str, status: int, said: str):
    response = alias(http, "shape", name, version)
    assert response.status_code == status
    assert said in response.json()["error"]["message"]


def test_what_the_doctor_says_is_kept_with_the_version(demo: httpx.Client):
    (version,) = demo.get("/v1/adapters/letter/versions").json()["data"]
    assert version["info"]["method"] == "LORA"
    assert all({"code", "severity", "message", "advice", "modules"} == set(f) for f in version["info"]["findings"])


def test_a_request_ends_on_what_it_began_with(http: httpx.Client, adapter_root: Path):
    folder = write_fake_adapter(adapter_root / "brief", name="brief")
    assert register(http, "brief", folder).status_code == 201
    body = {
        **{"model": "brief", "max_tokens": 150, "stream": True},
        "messages": [{"role": "user", "content": "one two three"}],
    }
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        assert any("brief:1" in line for line in lines)
        assert http.delete("/v1/adapters/brief").status_code == 200
        assert http.post("/v1/chat/completions", json=body).status_code == 404
        rest = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert rest[-1]["choices"][0]["finish_reason"] == "length"
    assert len(rest) > 50


def test_tools_made_for_vllm_load_and_unload(http: httpx.Client, adapter_root: Path):
    folder = write_fake_adapter(adapter_root / "theirs", name="theirs")
    body = {"lora_name": "theirs", "lora_path": str(folder)}
    loaded = http.post("/v1/load_lora_adapter", json=body)
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'theirs' added successfully.")
    again = http.post("/v1/load_lora_adapter", json=body)
    assert again.status_code == 400 and "already been loaded" in again.json()["error"]["message"]
    write_fake_adapter(folder, name="theirs", better=1)
    assert http.post("/v1/load_lora_adapter", json={**body, "load_inplace": True}).status_code == 200
    assert http.get("/v1/adapters/theirs").json()["num_versions"] == 2
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "theirs"}).status_code == 200
    gone = http.post("/v1/unload_lora_adapter", json={"lora_name": "theirs"})
    assert gone.status_code == 404 and "cannot be found" in gone.json()["error"]["message"]


def test_the_audit_is_read_page_by_page(http: httpx.Client):
    assert alias(http, "shape", "prod", "latest").status_code == 200
    assert http.delete("/v1/adapters/shape/aliases/prod").status_code == 200
    first = http.get("/v1/audit", params={"limit": 1}).json()
    assert (first["data"][0]["action"], first["data"][0]["subject"]) == ("alias.delete", "shape@prod")
    assert first["has_more"] is True
    second = http.get("/v1/audit", params={"limit": 1, "before": first["data"][0]["id"]}).json()
    assert second["data"][0]["action"] == "alias.move" and second["data"][0]["actor"] == "anyone"
    assert http.get("/v1/audit", params={"limit": 0}).status_code == 400
