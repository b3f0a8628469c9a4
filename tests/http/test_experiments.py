"""Experiments over HTTP on the fake engine, which says in its answer who was asked."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import yaml
from typer.testing import CliRunner

from serve.cli import app
from tests.fakes import write_fake_adapter
from tests.metrics import eventually
from tests.served import Served, served


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("adapters")
    names = ("old", "new", "third", "broken")
    for name in names:
        write_fake_adapter(root / name, name=name, head=name != "third")
    settings = {
        "base": {"name": "base"},
        "engine": {"kind": "fake", "options": {"max_running": 16, "token_s": 0.001, "max_model_len": 500}},
        "adapters": {"roots": [str(root)], "preload": {name: str(root / name) for name in names}},
        "engines": {"num_cpus": 0.5},
        "experiments": {"look_every_s": 0.5, "headers": ["x-plan"], "metadata": ["plan"]},
    }
    with served(tmp_path_factory.mktemp("service"), settings) as running:
        yield running


@pytest.fixture
def http(service: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=60) as client:
        yield client
        for experiment in client.get("/v1/experiments").json()["data"]:
            if "roll_back" in experiment["actions"] and experiment["state"] != "promoted":
                client.post(f"/v1/experiments/{experiment['id']}/roll_back", json={}).raise_for_status()


def definition(name: str, **more: object) -> dict:
    return {
        "name": name,
        "alias": f"{name}-model",
        "arms": [{"name": "control", "target": "old"}, {"name": "treatment", "target": "new"}],
        "metrics": [{"name": "solved"}],
        "decision_metric": "solved",
        **more,
    }


def create(http: httpx.Client, name: str, **more: object) -> dict:
    response = http.post("/v1/experiments", json=definition(name, **more))
    assert response.status_code == 201, response.text
    return response.json()


def act(http: httpx.Client, name: str, action: str, status: int = 200, **body: object) -> dict:
    response = http.post(f"/v1/experiments/{name}/{action}", json=body)
    assert response.status_code == status, response.text
    return response.json()


def ask(http: httpx.Client, model: str, headers: dict[str, str] | None = None, **body: object) -> httpx.Response:
    return http.post("/v1/completions", json={"model": model, "prompt": "hi", **body}, headers=headers)


def answered_by(response: httpx.Response) -> str:
    return response.json()["choices"][0]["text"].split(":")[0]


def test_an_alias_means_a_target_until_an_experiment_owns_it(http: httpx.Client, service: Served):
    assert http.put("/v1/aliases/tone-model", json={"target": "old"}).status_code == 200
    plain = ask(http, "tone-model")
    assert answered_by(plain) == "old" and plain.headers["X-Model-Served"].startswith("old@")
    assert "X-Experiment" not in plain.headers and plain.json()["model"] == "tone-model"
    create(http, "tone")
    assert answered_by(ask(http, "tone-model", user="u")) == "old", "a draft serves nobody"
    act(http, "tone", "run")
    assert http.put("/v1/aliases/tone-model", json={"target": "new"}).status_code == 409
    models = {model.id for model in openai.OpenAI(base_url=f"{service.url}/v1", api_key="x").models.list()}
    assert {"base", "tone-model", "old"} <= models
    arms = {}
    for number in range(60):
        response = ask(http, "tone-model", user=f"user {number}")
        assert response.headers["X-Assignment"] == "hash" and response.headers["X-Experiment"] == "tone"
        assert response.headers["X-Experiment-Phase"] == "1"
        arms[number] = response.headers["X-Variant"]
        assert answered_by(response) == {"control": "old", "treatment": "new"}[arms[number]]
        assert response.headers["X-Model-Served"].startswith(answered_by(response) + "@")
    assert 15 < Counter(arms.values())["control"] < 45
    again = {n: ask(http, "tone-model", user=f"user {n}").headers["X-Variant"] for n in range(60)}
    assert again == arms
    by_header = ask(http, "tone-model", {"X-Experiment-Unit": "user 7"}, user="someone else")
    assert by_header.headers["X-Variant"] == arms[7]
    told = http.get("/v1/experiments/tone/assignment", params={"unit": "user 7"}).json()
    assert told["arm"] == arms[7]
    with http.stream(
        "POST", "/v1/completions", json={"model": "tone-model", "prompt": "x", "stream": True, "user": "user 7"}
    ) as stream:
        assert stream.headers["X-Variant"] == arms[7] and stream.headers["X-Assignment"] == "hash"


def test_an_alias_may_have_an_adapters_name(http: httpx.Client):
    """So that clients who ask for an adapter come into an experiment on it, and change nothing."""
    assert answered_by(ask(http, "broken")) == "broken"
    assert http.put("/v1/aliases/broken", json={"target": "old:0.5+new:0.5"}).status_code == 200
    combined = ask(http, "broken")
    assert combined.json()["choices"][0]["text"].startswith("new:0.5+old:0.5 ") and combined.json()["model"] == "broken"
    assert answered_by(ask(http, "broken@latest")) == "broken", "with a version it is the adapter"
    assert [model["id"] for model in http.get("/v1/models").json()["data"]].count("broken") == 1
    assert http.put("/v1/aliases/base", json={"target": "old"}).status_code == 400
    assert http.put("/v1/aliases/new", json={"target": "nothing"}).status_code == 404
    assert http.delete("/v1/aliases/broken").status_code == 200
    assert answered_by(ask(http, "broken")) == "broken"
    assert http.delete("/v1/aliases/broken").status_code == 404


def test_every_endpoint_resolves_it(http: httpx.Client):
    create(http, "everywhere")
    act(http, "everywhere", "run")
    chat = http.post(
        "/v1/chat/completions",
        json={"model": "everywhere-model", "user": "u", "messages": [{"role": "user", "content": "hi"}]},
    )
    classified = http.post("/v1/classify", json={"model": "everywhere-model", "user": "u", "input": "one two"})
    text = ask(http, "everywhere-model", user="u")
    variants = {response.headers["X-Variant"] for response in (chat, classified, text)}
    assert len(variants) == 1, "one unit, one arm"
    assert {response.json()["model"] for response in (chat, classified, text)} == {"everywhere-model"}
    several = ask(http, "everywhere-model", user="u", prompt=["a", "b"])
    assert several.headers["X-Variant"] in variants and len(several.json()["choices"]) == 2


def test_feedback_counts_once_and_only_where_it_should(http: httpx.Client):
    create(http, "fed", metrics=[{"name": "solved"}, {"name": "score", "kind": "float", "level": "unit"}])
    act(http, "fed", "run")
    response = ask(http, "fed-model", user="u")
    request_id, answer_id = response.headers["X-Request-Id"], response.json()["id"]
    first = http.post("/v1/feedback", json={"request_id": request_id, "metric": "solved", "value": True})
    assert first.json() == {
        **{"object": "feedback", "request_id": request_id, "metric": "solved"},
        **{"counts": True, "repeated": False},
    }
    again = http.post("/v1/feedback", json={"request_id": answer_id, "metric": "solved", "value": True})
    assert again.json()["repeated"] is True
    other = http.post("/v1/feedback", json={"request_id": request_id, "metric": "solved", "value": False})
    assert other.status_code == 409
    for _ in range(2):
        keyed = {"request_id": request_id, "metric": "score", "value": 2.5, "idempotency_key": "one"}
        assert http.post("/v1/feedback", json=keyed).status_code == 200
    assert http.post("/v1/feedback", json={**keyed, "idempotency_key": "two"}).json()["repeated"] is False
    by_request = ask(http, "fed-model")
    assert by_request.headers["X-Assignment"] == "request" and by_request.headers["X-Variant"]
    forced = ask(http, "fed-model", {"X-Force-Variant": "treatment"}, user="u2")
    assert forced.headers["X-Assignment"] == "forced" and answered_by(forced) == "new"
    for uncounted in (by_request, forced):
        body = {"request_id": uncounted.headers["X-Request-Id"], "metric": "solved", "value": True}
        assert http.post("/v1/feedback", json=body).json()["counts"] is False
    results = http.get("/v1/experiments/fed/results").json()["results"]
    arm = response.headers["X-Variant"]
    (mine,) = [found for found in results["arms"] if found["arm"] == arm]
    assert (mine["units"], mine["requests"], mine["means"]["solved"], mine["means"]["score"]) == (1, 1, 1.0, 5.0)
    assert sum(found["units"] for found in results["arms"]) == 1
    assert results["excluded"] == {"request": 1, "forced": 1}


def test_who_does_not_take_part_gets_what_the_alias_means(http: httpx.Client):
    conditions = [
        {"attribute": "metadata.plan", "any_of": ["pro"]},
        {"attribute": "has_image", "none_of": ["true"]},
        {"attribute": "language", "any_of": ["de"]},
    ]
    create(http, "targeted", conditions=conditions)
    act(http, "targeted", "run")
    german = {"Accept-Language": "de-CH,de;q=0.9"}
    inside = ask(http, "targeted-model", german, user="u", metadata={"plan": "pro"})
    assert inside.headers["X-Assignment"] == "hash"
    for headers, metadata in ((german, {"plan": "free"}), ({}, {"plan": "pro"}), (german, {})):
        outside = ask(http, "targeted-model", headers, user="u", metadata=metadata)
        assert outside.headers["X-Assignment"] == "not_enrolled" and "X-Variant" not in outside.headers
        assert answered_by(outside) == "old"
    refused = http.post(
        "/v1/experiments", json=definition("t2", conditions=[{"attribute": "header.cookie", "any_of": ["x"]}])
    )
    assert refused.status_code == 400 and "header.cookie" in refused.json()["error"]["message"]


def test_its_life_and_what_it_leaves(http: httpx.Client):
    made = create(http, "lived")
    act(http, "lived", "promote", 409)
    act(http, "lived", "ramp")
    assert http.get("/v1/experiments/lived").json()["phase"]["coverage"] == 0.01
    act(http, "lived", "run", reason="quiet")
    act(http, "lived", "pause")
    paused = ask(http, "lived-model", user="u")
    assert paused.headers["X-Assignment"] == "not_enrolled" and answered_by(paused) == "old"
    act(http, "lived", "resume")
    refused = http.patch("/v1/experiments/lived", json={"coverage": 0.5})
    assert refused.status_code == 409 and "new phase" in refused.json()["error"]["message"]
    locked = http.patch("/v1/experiments/lived", json={"decision_metric": "error_rate"})
    assert locked.status_code == 409 and "declared before the data" in locked.json()["error"]["message"]
    arms = [{"name": "control", "target": "old", "weight": 2}, {"name": "treatment", "target": "new"}]
    phased = http.patch("/v1/experiments/lived", json={"arms": arms, "new_phase": True, "reason": "less of it"}).json()
    assert (phased["phase"]["number"], phased["phase"]["drawn"]) == (2, 1)
    assert ask(http, "lived-model", user="u").headers["X-Experiment-Phase"] == "2"
    before = http.get("/v1/experiments/lived/results", params={"phase": 1}).json()["results"]
    assert (before["phase"], [arm["planned_share"] for arm in before["arms"]]) == (1, [0.5, 0.5])
    assert http.get("/v1/experiments/lived/results", params={"phase": 9}).status_code == 404
    assert act(http, "lived", "decide", 409)["error"]["message"].startswith("Say which 'arm'")
    act(http, "lived", "decide", arm="treatment", reason="a hunch")
    assert ask(http, "lived-model", user="u").headers["X-Assignment"] == "hash", "nobody changes arms at a decision"
    act(http, "lived", "promote")
    after = ask(http, "lived-model", user="u")
    assert answered_by(after) == "new" and "X-Experiment" not in after.headers
    assert http.delete("/v1/adapters/new").status_code == 409, "an alias means it"
    act(http, "lived", "roll_back", reason="complaints")
    assert answered_by(ask(http, "lived-model", user="u")) == "old"
    counted = http.get("/v1/experiments/lived/results").json()["results"]
    act(http, "lived", "archive")
    kept = http.get("/v1/experiments/lived/results").json()["results"]
    assert (kept["state"], kept["arms"]) == ("archived", counted["arms"])
    history = http.get("/v1/experiments/lived/history").json()["data"]
    assert [entry["action"] for entry in reversed(history)] == [
        *("experiment.create", "experiment.ramp", "experiment.run", "experiment.pause", "experiment.resume"),
        *("experiment.phase", "experiment.decide", "experiment.promote", "experiment.roll_back", "experiment.archive"),
    ]
    assert {entry["subject"] for entry in history} == {made["id"]}
    assert history[1]["details"]["reason"] == "complaints"


def test_a_ramp_goes_up_by_itself(http: httpx.Client):
    create(http, "ramped", ramp={"steps": [0.2, 0.6, 1.0], "every_s": 0.5})
    act(http, "ramped", "ramp")
    assert http.get("/v1/experiments/ramped").json()["phase"]["coverage"] == 0.2
    deadline = time.monotonic() + 20
    while (found := http.get("/v1/experiments/ramped").json())["state"] == "ramping":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert (found["state"], found["phase"]["coverage"], found["phase"]["number"]) == ("running", 1.0, 1)


def test_an_arm_that_cannot_serve_is_left_for_what_the_alias_means(http: httpx.Client, service: Served):
    arms = [{"name": "control", "target": "old"}, {"name": "treatment", "target": "third"}]
    create(http, "fallen", arms=arms)
    act(http, "fallen", "run")
    seen = set()
    for number in range(20):
        response = http.post("/v1/classify", json={"model": "fallen-model", "user": f"u{number}", "input": "x"})
        assert response.status_code == 200, "without a head, the arm is left"
        assert response.headers["X-Model-Served"].startswith("old@")
        seen.add((response.headers["X-Variant"], response.headers["X-Assignment"]))
        body = {"request_id": response.headers["X-Request-Id"], "metric": "solved", "value": True}
        counts = http.post("/v1/feedback", json=body).json()["counts"]
        assert counts == (response.headers["X-Assignment"] == "hash")
    assert seen == {("control", "hash"), ("treatment", "fallback")}
    results = http.get("/v1/experiments/fallen/results").json()["results"]
    control, treatment = results["arms"]
    assert control["units"] + treatment["units"] == 20, "who fell back was exposed all the same"
    assert (treatment["requests"], treatment["fallbacks"]) == (0, treatment["units"])
    assert (control["means"]["error_rate"], treatment["means"]["error_rate"]) == (0.0, 1.0)


def test_shadow_arms_are_compared_and_answer_nobody(http: httpx.Client, service: Served):
    arms = [{"name": "control", "target": "old"}, {"name": "idea", "target": "new:0.5+third:0.5", "shadow": True}]
    create(http, "shadowed", arms=arms, shadow={"share": 1.0, "store_prompts": True})
    act(http, "shadowed", "shadow")
    for number in range(5):
        response = ask(http, "shadowed-model", user=f"u{number}", prompt=f"question {number}")
        assert answered_by(response) == "old" and response.headers["X-Assignment"] == "not_enrolled"
        time.sleep(0.2)
    deadline = time.monotonic() + 10
    while len(pairs := http.get("/v1/experiments/shadowed/pairs").json()["data"]) < 5:
        assert time.monotonic() < deadline, pairs
        time.sleep(0.1)
    newest = pairs[0]
    assert newest["prompt"] == "question 4" and newest["answer"].startswith("old:1 ")
    assert newest["shadow_answer"].startswith("new:0.5+third:0.5 ") and newest["shadow"] == "idea"
    page = http.get("/v1/experiments/shadowed/pairs", params={"limit": 2, "before": pairs[1]["id"]}).json()
    assert [pair["id"] for pair in page["data"]] == [pairs[2]["id"], pairs[3]["id"]] and page["has_more"]
    copied = {"experiment": "shadowed", "outcome": "answered", "variant": "idea"}
    eventually(service.url, lambda found: found.total("loom_shadow_requests_total", **copied) == 5)


def test_the_command_line(http: httpx.Client, service: Served, tmp_path: Path):
    def loom(*arguments: str, status: int = 0) -> str:
        done = CliRunner().invoke(app, list(arguments), env={"LOOM_URL": service.url, "COLUMNS": "200"})
        assert done.exit_code == status, done.output
        return done.output

    whole, part = tmp_path / "whole.yaml", tmp_path / "part.json"
    whole.write_text(yaml.safe_dump(definition("typed")))
    part.write_text('{"coverage": 0.5}')
    assert "is a draft; it can shadow, ramp, run, archive" in loom("experiments", "create", str(whole))
    assert "typed is running" in loom("experiments", "move", "typed", "run", "-r", "why not")
    assert "needs a new phase" in loom("experiments", "change", "typed", str(part), status=1)
    assert "phase 2" in loom("experiments", "change", "typed", str(part), "--new-phase", "-r", "less")
    assert "50 %" in loom("experiments", "ls") and "why not" in loom("experiments", "history", "typed")
    shown = loom("experiments", "results", "typed")
    assert "Fewer than 100 units" in shown and "solved" in shown and "ttft" in shown
    assert "typed-model" in loom("aliases", "ls")
    assert "owns 'typed-model'" in loom("aliases", "set", "typed-model", "new", status=1)
    loom("experiments", "move", "typed", "roll_back")
    moved = loom("aliases", "set", "typed-model", "old:0.5+new:0.5")
    assert "means new:0.5+old:0.5" in re.sub("@[0-9a-f]{64}", "", moved)
    assert "Removed" in loom("aliases", "rm", "typed-model")
    assert "only a draft" in loom("experiments", "rm", "typed", status=1)
    part.write_text("{")
    assert "no valid YAML" in loom("experiments", "create", str(part), status=1)
    assert "cannot be read" in loom("experiments", "create", str(tmp_path / "none.yaml"), status=1)


def test_shadow_arms_give_way(http: httpx.Client, service: Served):
    """An engine with 24 places, kept busy by 14 users: few copies find room, and nobody's answer is late for one."""
    arms = [{"name": "control", "target": "old"}, {"name": "idea", "target": "new", "shadow": True}]
    create(http, "busy", arms=arms, shadow={"share": 1.0})

    def burst() -> float:
        begun = time.monotonic()
        with ThreadPoolExecutor(14) as pool:
            answers = list(pool.map(lambda n: ask(http, "busy-model", user=f"u{n}", max_tokens=80), range(60)))
        assert {response.status_code for response in answers} == {200}
        return time.monotonic() - begun

    http.put("/v1/aliases/busy-model", json={"target": "old"}).raise_for_status()
    alone = burst()
    act(http, "busy", "shadow")
    beside = burst()
    name, copies = "loom_shadow_requests_total", {"experiment": "busy", "variant": "idea"}
    found = eventually(service.url, lambda found: found.total(name, outcome="dropped", **copies) > 40)
    assert found.total(name, **copies) <= 60
    assert beside < 1.5 * alone + 0.5


def test_layers_keep_experiments_apart(http: httpx.Client):
    for name, share in (("left", 0.6), ("right", 0.4)):
        create(http, name, layer={"name": "shared", "share": share})
        act(http, name, "run")
    create(http, "late", layer={"name": "shared", "share": 0.1})
    assert "layer 'shared' has 0" in act(http, "late", "run", 409)["error"]["message"]
    seen = Counter()
    for number in range(60):
        kinds = tuple(
            ask(http, f"{name}-model", user=f"u{number}").headers["X-Assignment"] for name in ("left", "right")
        )
        seen[kinds] += 1
    assert set(seen) == {("hash", "not_enrolled"), ("not_enrolled", "hash")}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            {"arms": [{"name": "a", "target": "old", "weight": 0}, {"name": "b", "target": "new", "weight": 0}]},
            "sum to 0",
        ),
        (
            {"arms": [{"name": "a", "target": "old"}, {"name": "b", "target": "nothing"}]},
            "no model or adapter 'nothing'",
        ),
        ({"arms": [{"name": "a", "target": "old"}]}, "at least 2"),
        ({"arms": [{"name": "a", "target": "old"}, {"name": "a", "target": "new"}]}, "two arms have one name"),
        ({"arms": [{"name": "a", "target": "old", "weight": "NaN"}, {"name": "b", "target": "new"}]}, "finite"),
        ({"control": "nobody"}, "must be an arm"),
        ({"decision_metric": "smiles"}, "no declared metric"),
        ({"metrics": [{"name": "error_rate"}]}, "measured by itself"),
        ({"guardrails": [{"metric": "smiles"}]}, "no declared metric"),
        ({"coverage": 0}, "greater than 0"),
        ({"alias": "base"}, "not the base's name"),
        ({"ramp": {"steps": [0.5, 0.1]}}, "more than the one before"),
        ({"conditions": [{"attribute": "moon", "any_of": ["full"]}]}, "'attribute' must be"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_definition_that_makes_no_sense(http: httpx.Client, body: dict, said: str):
    before = http.get("/v1/experiments").json()["data"]
    response = http.post("/v1/experiments", json=definition("bad") | body)
    assert response.status_code in (400, 404), response.text
    assert said in response.json()["error"]["message"]
    assert http.get("/v1/experiments").json()["data"] == before


def test_bad_feedback_and_bad_units_store_nothing(http: httpx.Client):
    create(http, "picky", metrics=[{"name": "solved"}, {"name": "score", "kind": "float"}])
    act(http, "picky", "run")
    request_id = ask(http, "picky-model", user="u").headers["X-Request-Id"]
    for body, status, said in (
        ({"value": "NaN"}, 400, "value"),
        ({"value": 2}, 400, "true or false"),
        ({"metric": "score", "value": True}, 400, "takes a number"),
        ({"metric": "score", "value": 1e300}, 400, "at most"),
        ({"metric": "nothing"}, 400, "declared no metric"),
        ({"request_id": "never-issued"}, 404, "No experiment answered"),
        ({"request_id": "x" * 200}, 400, "request_id"),
    ):
        response = http.post("/v1/feedback", json={"request_id": request_id, "metric": "solved", "value": True, **body})
        assert response.status_code == status and said in response.json()["error"]["message"], response.text
    raw = f'{{"request_id": "{request_id}", "metric": "score", "value": NaN}}'
    response = http.post("/v1/feedback", content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]["param"] is not None
    for more in (
        {"metadata": {"experiment_unit": "x" * 10_000_000}},
        {"metadata": {"k" * 65: "v"}},
        {"user": "x" * 513},
    ):
        response = ask(http, "picky-model", **more)
        assert response.status_code == 400, response.text
        assert "error" in response.json()
    assert ask(http, "picky-model", {"X-Experiment-Unit": "x" * 600}).status_code == 400
    forced = ask(http, "picky-model", {"X-Force-Variant": "nobody"})
    assert forced.status_code == 400 and "control, treatment" in forced.json()["error"]["message"]
    results = http.get("/v1/experiments/picky/results").json()["results"]
    assert sum(arm["units"] for arm in results["arms"]) == 1
    assert all(arm["means"]["solved"] is None and arm["means"]["score"] is None for arm in results["arms"])
