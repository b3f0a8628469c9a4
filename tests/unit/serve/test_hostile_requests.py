"""Whatever a request holds, the whole gateway answers it with an error of the caller's, and never with a fault."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from tests.fakes import EMPTY_TENSORS, write_fake_adapter
from tests.gateways import gateway
from tests.unit.serve.conftest import new_database

MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
EXPERIMENT = {
    "name": "tone",
    "alias": "support",
    "arms": [{"name": "control", "target": "shape"}, {"name": "other", "target": "french"}],
    "metrics": [{"name": "solved"}],
    "conditions": [{"attribute": "tenant", "any_of": ["x"]}],
}
BODIES: dict[tuple[str, str], Any] = {
    ("POST", "/v1/chat/completions"): {
        "model": "live", "messages": MESSAGES, "stop": ["x"], "user": "u", "metadata": {"k": "v"},
    },
    ("POST", "/v1/completions"): {"model": "live", "prompt": ["hi"], "adapters": [{"id": "shape"}]},
    ("POST", "/v1/classify"): {"model": "live", "messages": MESSAGES, "head": "score"},
    ("POST", "/v1/adapters"): {"name": "a", "path": "b"},
    ("PUT", "/v1/adapters/{name}/aliases/{alias}"): {"version": "latest"},
    ("POST", "/v1/load_lora_adapter"): {"lora_name": "a", "lora_path": "b"},
    ("POST", "/v1/unload_lora_adapter"): {"lora_name": "a"},
    ("PUT", "/v1/aliases/{name}"): {"target": "shape"},
    ("POST", "/v1/experiments"): EXPERIMENT,
    ("PATCH", "/v1/experiments/{name}"): {**EXPERIMENT, "reason": "r"},
    ("POST", "/v1/experiments/{name}/{action}"): {"reason": "r"},
    ("POST", "/v1/feedback"): {"request_id": "r", "metric": "solved", "value": 1, "idempotency_key": "k"},
    ("POST", "/v1/merges"): {
        "name": "m", "method": "cat", "inputs": [{"adapter": "shape", "weight": [1, 2]}], "search": {"examples": "x"},
    },
    ("POST", "/v1/merges/plan"): {"name": "m", "method": "cat", "inputs": [{"adapter": "shape"}]},
}  # fmt: skip


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A gateway with two adapters and a running experiment behind the alias ``live``."""
    folder: Path = tmp_path_factory.mktemp("hostile")
    for name in ("shape", "french"):
        write_fake_adapter(folder / "adapters" / name, name=name, head=True)
    adapters = {
        "roots": [str(folder / "adapters")],
        "preload": {name: str(folder / "adapters" / name) for name in ("shape", "french")},
    }
    with ExitStack() as stack:
        url = stack.enter_context(new_database()) if request.param == "postgresql" else None
        app = gateway({"state_dir": str(folder / "state"), "registry": {"url": url}, "adapters": adapters})
        running = stack.enter_context(TestClient(app, raise_server_exceptions=False))
        assert running.put("/v1/aliases/live", json={"target": "shape"}).status_code == 200
        made = running.post("/v1/experiments", json={**EXPERIMENT, "alias": "live", "name": "live", "conditions": []})
        assert made.status_code == 201, made.text
        started = running.post("/v1/experiments/live/run", json={"reason": "go"})
        assert started.status_code == 200, started.text
        yield running


TEXTS = st.text(st.characters(), max_size=6) | st.sampled_from(
    ["\ud800", "a\udfffb", "\0", "a\0b", "..", "/etc", "\U0001f600", "x" * 5000, "@", ":", "1e999"]
)
VALUES = st.recursive(
    TEXTS
    | st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([10**400, -(10**30), [1] * 5000, [{}] * 5000, dict.fromkeys(map(str, range(600)), 1)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place in a body where something could stand."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


def with_at(value: Any, path: tuple[str | int, ...], new: Any) -> Any:
    """``value`` with ``new`` at ``path``."""
    if not path:
        return new
    copied = value.copy()
    copied[path[0]] = with_at(value[path[0]], path[1:], new)
    return copied


@st.composite
def spoiled(draw: st.DrawFn) -> tuple[str, str, Any]:
    """A route, and a body of its with something else at one place."""
    (method, path), body = draw(st.sampled_from(list(BODIES.items())))
    return method, path, with_at(body, draw(st.sampled_from(places(body))), draw(VALUES))


def path_with(template: str, name: str) -> str:
    return template.replace("{name}", name).replace("{alias}", name).replace("{action}", "run")


def check(response: Any) -> None:
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_every_route_with_a_body_is_tried(client: TestClient):
    described = {
        (method.upper(), path)
        for path, methods in client.app.openapi()["paths"].items()  # type: ignore[attr-defined]
        for method, operation in methods.items()
        if "requestBody" in operation
    }
    assert described == {*BODIES, ("POST", "/v1/adapters/{name}/versions")}


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(spoiled())
@example(("POST", "/v1/chat/completions", {"model": "live", "messages": [{"role": "user", "content": "\ud800"}]}))
@example(("POST", "/v1/chat/completions", {"model": "live", "messages": [{"role": "user", "content": "\0"}]}))
@example(("POST", "/v1/feedback", {"request_id": "\0", "metric": "solved", "value": 1}))
@example(("POST", "/v1/merges", {"name": "m", "method": "cat", "inputs": [{"adapter": "\0"}]}))
def test_no_body_is_a_fault(client: TestClient, asked: tuple[str, str, Any]):
    method, path, body = asked
    content = json.dumps(body).encode()
    check(
        client.request(method, path_with(path, "live"), content=content, headers={"Content-Type": "application/json"})
    )


@pytest.mark.parametrize("path", [path for _, path in BODIES if path != "/v1/adapters/{name}/versions"])
@pytest.mark.parametrize("text", [b"\\ud800", b"\\udc00\\ud800", b"\xed\xa0\x80"])
def test_an_unpaired_surrogate_is_refused_by_every_route(client: TestClient, path: str, text: bytes):
    method = next(method for method, known in BODIES if known == path)
    for content in (b'{"model": "live", "a": "%s"}' % text, b'{"%s": 1}' % text):
        answer = client.request(
            method, path_with(path, "live"), content=content, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] in ("invalid_text", "invalid_json")


def test_a_broken_text_is_not_an_error_of_the_arm(client: TestClient):
    for content in (b'"\\ud800"', b'[{"type": "text", "text": "\\ud800"}]'):
        body = b'{"model": "live", "user": "u", "messages": [{"role": "user", "content": %s}]}' % content
        answer = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (
            400,
            "messages[0].content" if content.startswith(b'"') else "messages[0].content[0].text",
        )
        assert "x-variant" not in answer.headers


GETS = (
    "/v1/models/{}", "/v1/adapters/{}", "/v1/adapters/{}/versions", "/v1/adapters/shape/versions/{}",
    "/v1/experiments/{}", "/v1/experiments/{}/results", "/v1/experiments/{}/history", "/v1/experiments/{}/pairs",
    "/v1/experiments/live/assignment?unit={}", "/v1/merges/{}", "/v1/merges/{}/logs", "/v1/merges?state={}",
    "/v1/checkpoints/{}", "/v1/audit?before={}", "/experiments/{}",
)  # fmt: skip
DELETES = (
    "/v1/adapters/{}", "/v1/adapters/shape/versions/{}", "/v1/adapters/shape/aliases/{}", "/v1/aliases/{}",
    "/v1/experiments/{}",
)  # fmt: skip


@pytest.mark.parametrize("name", ["%00", "a%00b", "%ff", "%ed%a0%80", "%f0%9f%98%80", "%0a", "..%2f..", "x" * 3000])
def test_no_path_and_no_query_is_a_fault(client: TestClient, name: str):
    for path in GETS:
        check(client.get(path.format(name)))
    for path in DELETES:
        check(client.delete(path.format(name)))
    for path in ("/v1/aliases/{}", "/v1/adapters/shape/aliases/{}"):
        check(client.put(path.format(name), json={"target": "shape", "version": "latest"}))


@pytest.mark.parametrize("value", [b"\xff", b"\xed\xa0\x80", b"\xc3\xa9", b"a b", b"x" * 4000, b"'\"<>", b"="])
@pytest.mark.parametrize(
    "name",
    ["X-Experiment-Unit", "X-Force-Variant", "Idempotency-Key", "Accept-Language", "traceparent", "Authorization"],
)
def test_no_header_is_a_fault(client: TestClient, name: str, value: bytes):
    check(client.post("/v1/chat/completions", json={"model": "live", "messages": MESSAGES}, headers={name: value}))
    check(client.put("/v1/aliases/other", json={"target": "shape"}, headers={name: value}))


@pytest.mark.parametrize("charset", ["utf-7", "unicode_escape", "undefined", "punycode", "utf-16", "hex", "nothing"])
@pytest.mark.parametrize("name", [rb"\ud800", b"\xed\xa0\x80", b"a\x00b", b"+2AA-"])
def test_no_form_is_a_fault(client: TestClient, charset: str, name: bytes):
    for disposition in (b'name="%s"; filename="adapter_config.json"' % name, b'name="files"; filename="%s"' % name):
        form = b"--x\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n--x--\r\n" % (disposition, EMPTY_TENSORS)
        for content_type in ("multipart/form-data; boundary=x", f"multipart/form-data; boundary=x; charset={charset}"):
            answer = client.post("/v1/adapters/new/versions", content=form, headers={"Content-Type": content_type})
            check(answer)
            assert answer.status_code == 400


@pytest.mark.parametrize("value", ["", "a b", "x" * 129, "a\tb", "../x", b"\xff"])
def test_an_unsound_request_id_is_refused_and_the_rule_is_named(client: TestClient, value: str | bytes):
    answer = client.get("/v1/models", headers={"X-Request-Id": value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "X-Request-Id")
    assert "128" in answer.json()["error"]["message"]
