"""Bad input: one clear 4xx each in OpenAI's shape, and the next request is answered."""

from __future__ import annotations

import base64
import json

import httpx
import pytest

GOOD = {"model": "base", "messages": [{"role": "user", "content": "hi"}]}


def image(data: bytes) -> dict:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def with_content(*parts: dict) -> dict:
    return {"model": "base", "messages": [{"role": "user", "content": list(parts)}]}


@pytest.fixture(autouse=True)
def _the_next_request_is_answered(http: httpx.Client):
    yield
    assert http.post("/v1/chat/completions", json=GOOD).status_code == 200


CASES = {
    "unknown role": ({**GOOD, "messages": [{"role": "robot", "content": "hi"}]}, 400, "role"),
    "no messages": ({**GOOD, "messages": []}, 400, "messages"),
    "no model": ({"messages": GOOD["messages"]}, 400, "model"),
    "unknown model": ({**GOOD, "model": "nobody"}, 404, "nobody"),
    "a malformed model": ({**GOOD, "model": "shape:0.5:0.5"}, 400, "model name"),
    "an empty model": ({**GOOD, "model": ""}, 400, "model name"),
    "a weight twice": ({**GOOD, "model": "shape:0.5+shape:0.5"}, 400, "twice"),
    "a huge weight": ({**GOOD, "model": "shape:1e300"}, 400, "weight"),
    "an overflowing weight": ({**GOOD, "model": "shape:1e999"}, 400, "weight"),
    "adapters beside a model": ({**GOOD, "model": "shape", "adapters": [{"id": "shape"}]}, 400, "adapters"),
    "an unknown version": ({**GOOD, "model": "shape@000000"}, 404, "version"),
    "an unknown field": ({**GOOD, "temprature": 1}, 400, "temprature"),
    "a temperature of text": ({**GOOD, "temperature": "hot"}, 400, "temperature"),
    "too hot": ({**GOOD, "temperature": 3}, 400, "temperature"),
    "max_tokens 0": ({**GOOD, "max_tokens": 0}, 400, "max_tokens"),
    "context overflow": ({**GOOD, "max_tokens": 100_000}, 400, "context"),
    "too many choices": ({**GOOD, "n": 1000}, 400, "n"),
    "a remote image": (
        with_content({"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}), 400, "not fetched"
    ),
    "base64 that is none": (
        with_content({"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}}), 400, "base64"
    ),
    "not an image": (with_content(image(b"hello")), 400, "image"),
    "an unknown part": (with_content({"type": "video_url", "video_url": {"url": "x"}}), 400, "content"),
    "log-probabilities of the prompt": ({**GOOD, "prompt_logprobs": 1}, 400, "prompt_logprobs"),
    "an unserved option": ({**GOOD, "response_format": {"type": "json_object"}}, 400, "response_format"),
}  # fmt: skip


def test_headers_are_bounded(http: httpx.Client):
    refused = http.post("/v1/chat/completions", json=GOOD, headers={"X-Large": "x" * 200_000})
    assert (refused.status_code, refused.json()["error"]["code"]) == (431, "headers_too_large")


def test_one_bad_prompt_of_several_is_refused_as_itself(http: httpx.Client):
    refused = http.post("/v1/completions", json={"model": "base", "prompt": ["a", "b " * 600], "max_tokens": 2})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_overflow")


@pytest.mark.parametrize("name", CASES)
def test_one_clear_error(http: httpx.Client, name: str):
    body, status, words = CASES[name]
    response = http.post("/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert response.status_code == status
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'{"model": "base", "messages": [{"role": "user", "content": "hi"}], "temperature": NaN}', 400),
        (b'{"model": "base", "adapters": [{"id": "shape", "weight": Infinity}], "messages": []}', 400),
        (b"\xff\xfe\x00", 400),
        (b"[" * 100_000, 400),
    ],
)
def test_bodies_that_are_no_request(http: httpx.Client, content: bytes, status: int):
    response = http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_nan_weights_are_refused_wherever_they_stand(http: httpx.Client):
    for adapters in ('[{"id": "shape", "weight": NaN}]', '[{"id": "shape", "weight": -Infinity}]'):
        content = f'{{"adapters": {adapters}, "messages": [{{"role": "user", "content": "hi"}}]}}'
        response = http.post(
            "/v1/chat/completions", content=content.encode(), headers={"Content-Type": "application/json"}
        )
        assert response.status_code == 400
        assert "shape" in response.json()["error"]["message"]


def test_a_body_of_50_megabytes_is_refused(http: httpx.Client):
    response = http.post("/v1/chat/completions", content=b"x" * 50_000_000)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


def test_a_body_that_hides_its_length_is_refused(http: httpx.Client):
    response = http.post("/v1/chat/completions", content=(b"x" * 1_000_000 for _ in range(50)))
    assert response.status_code == 413


def test_unknown_routes_and_methods(http: httpx.Client):
    assert http.get("/v1/nothing").json()["error"]["code"] == "unknown_url"
    assert http.put("/v1/chat/completions", json=GOOD).status_code == 405


def test_errors_never_echo_what_was_asked(http: httpx.Client):
    body = {**GOOD, "messages": [{"role": "user", "content": 5, "secret": "my-secret-prompt"}]}
    assert "my-secret-prompt" not in http.post("/v1/chat/completions", json=body).text


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"name": "ghost", "path": "ghost"}, 400, "outside"),
        ({"name": "ghost", "path": "/etc"}, 400, "outside"),
        ({"name": "a/b", "path": "x"}, 400, "name"),
        ({"name": "base", "path": "x"}, 400, "name"),
        ({"name": "ghost"}, 400, "path"),
    ],
)
def test_registrations_that_cannot_be(http: httpx.Client, body, status, words):
    response = http.post("/v1/adapters", json=body)
    assert response.status_code == status
    assert words in response.json()["error"]["message"]


def test_a_missing_adapter_file(http: httpx.Client, adapter_root):
    response = http.post("/v1/adapters", json={"name": "ghost", "path": str(adapter_root / "ghost")})
    assert response.status_code == 404
    assert "adapter_config.json" in response.json()["error"]["message"]
    assert str(adapter_root) not in response.text


def test_links_and_dots_do_not_lead_out(http: httpx.Client, adapter_root):
    (adapter_root / "link").symlink_to("/etc")
    for path in (adapter_root / "link", adapter_root / ".." / ".." / "etc"):
        response = http.post("/v1/adapters", json={"name": "ghost", "path": str(path)})
        assert response.status_code == 400
        assert "outside" in response.json()["error"]["message"]


def test_deleting_what_is_not_there(http: httpx.Client):
    response = http.delete("/v1/adapters/ghost")
    assert response.status_code == 404
    assert json.loads(response.text)["error"]["type"] == "not_found_error"
