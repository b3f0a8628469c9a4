"""Two tenants with a key each: over every route, what belongs to the other is what does not exist."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from serve.identity import Scope
from serve.registry.database import Database
from serve.registry.merges import Merges
from tests.fakes import write_fake_adapter
from tests.gateways import Gateway, gateway

EVERY_SCOPE = (Scope.INFER, Scope.ADAPTERS, Scope.EXPERIMENTS, Scope.MERGES)
ASK = {"model": "zeta-alias", "prompt": "hi", "user": "u", "max_tokens": 1}
OURS, THEIRS = "ours", "zeta"
MERGE_ID, EXPERIMENT_ID = "merge_0000000000000000", "exp_0000000000000000"


class World:
    """What ``zeta-*`` has made; ``zetb-*`` has made nothing of the kind."""

    def __init__(self, running: Gateway, ours: httpx.AsyncClient, theirs: httpx.AsyncClient) -> None:
        self.running, self.ours, self.theirs = running, ours, theirs
        self.experiment_id = self.merge_id = self.request_id = ""


def definition(name: str, alias: str, owner: str = THEIRS) -> dict[str, Any]:
    arms = [{"name": "control", "target": f"{owner}-a"}, {"name": "treatment", "target": f"{owner}-b"}]
    return {"name": name, "alias": alias, "arms": arms, "metrics": [{"name": "solved"}]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    folder = tmp_path_factory.mktemp("tenants")
    names = ("ours-a", "ours-b", "zeta-a", "zeta-b")
    for name in names:
        write_fake_adapter(folder / "adapters" / name, name=name, head=True)
    settings = {
        "auth": {"required": True},
        "adapters": {
            "roots": [str(folder / "adapters")],
            "preload": {name: str(folder / "adapters" / name) for name in names},
        },
    }
    async with gateway(folder, settings) as running:
        ours = running.client(*EVERY_SCOPE, adapters=["ours-*"])
        theirs = running.client(*EVERY_SCOPE, adapters=["zeta-*"])
        await asyncio.sleep(1)
        made = World(running, ours, theirs)
        (await theirs.put("/v1/aliases/zeta-plain", json={"target": "zeta-a"})).raise_for_status()
        created = await theirs.post("/v1/experiments", json=definition("zeta-test", "zeta-alias"))
        made.experiment_id = created.json()["id"]
        (await theirs.post("/v1/experiments/zeta-test/run", json={})).raise_for_status()
        answer = await theirs.post("/v1/completions", json=ASK)
        made.request_id = answer.json()["id"].removeprefix("cmpl-")
        report = {"request_id": made.request_id, "metric": "solved", "value": True}
        assert (await theirs.post("/v1/feedback", json=report)).json()["counts"] is True
        plan = {"recipe": {"product": "adapter", "method": "cat", "name": "zeta-merged"}}
        merges = Merges(Database(running.settings.registry_url))
        made.merge_id = merges.create("zeta-merged", plan, "plan", actor="them").id
        yield made
        await ours.aclose()
        await theirs.aclose()


def routes() -> list[tuple[str, str, Any]]:
    """Method, path and body of every request that names something. ``{…}`` is filled in with what they have made, and
    with what there is not."""
    experiment = [("GET", ""), ("GET", "/results"), ("GET", "/results?phase=7"), ("GET", "/pairs"), ("GET", "/history"),
                  ("GET", "/plan?effect=0.1"), ("GET", "/assignment?unit=u"), ("DELETE", "")]  # fmt: skip
    found: list[tuple[str, str, Any]] = []
    for named in ("{experiment}", "{experiment_id}"):
        found += [(method, f"/v1/experiments/{named}{path}", None) for method, path in experiment]
        found += [("PATCH", f"/v1/experiments/{named}", {"coverage": 0.5, "reason": "x"})]
        found += [
            ("POST", f"/v1/experiments/{named}/{action}", {"reason": "x"})
            for action in ("shadow", "ramp", "run", "pause", "resume", "decide", "promote", "roll_back", "archive")
        ]
    adapter = "/v1/adapters/{adapter}"
    found += [
        ("PUT", "/v1/aliases/{alias}", {"target": "base"}), ("DELETE", "/v1/aliases/{alias}", None),
        ("PUT", "/v1/aliases/{live}", {"target": "base"}), ("DELETE", "/v1/aliases/{live}", None),
        ("PUT", "/v1/aliases/ours-new", {"target": "{adapter}"}),
        ("PUT", "/v1/aliases/ours-new", {"target": "ours-a+{adapter}"}),
        ("POST", "/v1/feedback", {"request_id": "{request}", "metric": "solved", "value": True}),
        ("POST", "/v1/feedback", {"request_id": "cmpl-{request}", "metric": "other", "value": 2}),
        ("POST", "/v1/experiments", definition("{experiment}", "ours-alias", OURS)),
        ("POST", "/v1/experiments", definition("ours-test", "{live}", OURS)),
        ("POST", "/v1/experiments", definition("ours-test", "ours-alias") | {"arms": [
            {"name": "control", "target": "ours-a"}, {"name": "treatment", "target": "{adapter}"}]}),
        ("POST", "/v1/experiments", definition("ours-test", "ours-alias", OURS) | {
            "layer": {"name": "{adapter}", "share": 1.0}}),
        ("GET", adapter, None), ("DELETE", adapter, None), ("GET", f"{adapter}/versions", None),
        ("GET", f"{adapter}/versions/latest", None), ("DELETE", f"{adapter}/versions/latest", None),
        ("PUT", f"{adapter}/aliases/prod", {"version": "latest"}), ("DELETE", f"{adapter}/aliases/prod", None),
        ("POST", f"{adapter}/versions", None), ("POST", "/v1/adapters", {"name": "{adapter}", "path": "/x"}),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "{adapter}", "lora_path": "/x"}),
        ("POST", "/v1/unload_lora_adapter", {"lora_name": "{adapter}"}),
        ("GET", "/v1/models/{adapter}", None), ("GET", "/v1/models/{live}", None), ("GET", "/v1/models/{alias}", None),
        ("GET", "/v1/models/ours-a+{adapter}", None),
        ("GET", "/v1/merges/{merge}", None), ("POST", "/v1/merges/{merge}/cancel", None),
        ("GET", "/v1/merges/{merge}/logs", None), ("GET", "/v1/checkpoints/{merged}", None),
    ]  # fmt: skip
    recipe = {"name": "ours-merged", "method": "cat", "inputs": [{"adapter": "ours-a"}, {"adapter": "ours-b"}]}
    for path in ("/v1/merges", "/v1/merges/plan"):
        found += [("POST", path, recipe | {"name": "{merged}"}),
                  ("POST", path, recipe | {"inputs": [{"adapter": "ours-a"}, {"adapter": "{adapter}"}]})]  # fmt: skip
    for model in ("{adapter}", "{live}", "{alias}", "ours-a:0.5+{adapter}", "{adapter}@latest"):
        chat = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        found += [("POST", "/v1/completions", ASK | {"model": model}), ("POST", "/v1/chat/completions", chat),
                  ("POST", "/v1/classify", {"model": model, "input": "hi"})]  # fmt: skip
    found += [("POST", "/v1/completions", {**ASK, "model": "base", "adapters": [{"name": "{adapter}"}]})]
    return found


def filled(value: Any, words: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: filled(inner, words) for key, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner, words) for inner in value]
    if isinstance(value, str):
        for word, meaning in words.items():
            value = value.replace("{" + word + "}", meaning)
    return value


def without(text: str, words: dict[str, str]) -> str:
    """``text`` with what was asked for put back into the gaps, so that two answers can be compared."""
    for word, meaning in sorted(words.items(), key=lambda item: -len(item[1])):
        text = text.replace(meaning, "{" + word + "}")
    return text


@pytest.mark.parametrize(("method", "path", "body"), routes(), ids=lambda part: str(part)[:60])
@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_theirs_is_told_as_what_does_not_exist(world: World, method: str, path: str, body: Any):
    theirs = {"experiment": "zeta-test", "experiment_id": world.experiment_id, "alias": "zeta-plain",
              "live": "zeta-alias", "request": world.request_id, "adapter": "zeta-a", "merge": world.merge_id,
              "merged": "zeta-merged"}  # fmt: skip
    nobodys = {"experiment": "zetb-test", "experiment_id": EXPERIMENT_ID, "alias": "zetb-plain",
               "live": "zetb-alias", "request": "0" * 32, "adapter": "zetb-a", "merge": MERGE_ID,
               "merged": "zetb-merged"}  # fmt: skip
    answers = []
    for words in (theirs, nobodys):
        answer = await world.ours.request(method, filled(path, words), json=filled(body, words))
        told = {name: value for name, value in answer.headers.items() if name not in ("x-request-id", "content-length")}
        answers.append((answer.status_code, without(answer.text, words), told))
        assert answer.status_code in (400, 403, 404), answer.text
    assert answers[0] == answers[1]


@pytest.mark.parametrize("path", ["/v1/aliases", "/v1/experiments", "/v1/adapters", "/v1/models", "/v1/merges",
                                  "/v1/checkpoints"])  # fmt: skip
@pytest.mark.asyncio(loop_scope="module")
async def test_lists_hold_nothing_of_theirs(world: World, path: str):
    listed = await world.ours.get(path)
    assert listed.status_code == 200 and "zeta" not in listed.text


@pytest.mark.asyncio(loop_scope="module")
async def test_the_table_has_every_route_that_names_something(world: World):
    described = world.running.app.openapi()["paths"]
    named = {(method.upper(), path) for path, of in described.items() for method in of if "{" in path}
    asked = {(method, re.sub(r"\?.*", "", path)) for method, path, _ in routes()}
    shape = {
        (method, re.sub(r"\{[^}]*\}|ours-new|ours-a\+|latest$|prod$", "*", path).replace("**", "*"))
        for method, path in asked
    }
    actions = "shadow|ramp|run|pause|resume|decide|promote|roll_back|archive"
    shape = {(method, re.sub(rf"/({actions})$", "/*", path)) for method, path in shape}
    missing = {(method, re.sub(r"\{[^}]*\}", "*", path)) for method, path in named} - shape
    assert {path for _, path in missing if path.startswith("/v1/")} == set(), missing


@pytest.mark.asyncio(loop_scope="module")
async def test_feedback_needs_the_request_and_the_alias_in_reach(world: World):
    report = {"request_id": world.request_id, "metric": "solved", "value": True, "idempotency_key": "judge"}
    assert (await world.theirs.post("/v1/feedback", json=report)).status_code == 200
    for scopes, adapters, status in (
        ((Scope.EXPERIMENTS,), ["ours-*"], 404),
        ((Scope.INFER,), None, 404),
        ((Scope.ADMIN,), ["ours-*"], 404),
        ((Scope.EXPERIMENTS,), None, 200),
        ((Scope.EXPERIMENTS,), ["zeta-alias"], 200),
    ):
        client = world.running.client(*scopes, adapters=adapters)
        await asyncio.sleep(1)
        assert (await client.post("/v1/feedback", json=report)).status_code == status, (scopes, adapters)


@pytest.mark.asyncio(loop_scope="module")
async def test_names_are_taken_from_the_keys_own_patterns(world: World):
    refused = await world.ours.post("/v1/experiments", json=definition("free", "ours-alias", OURS))
    assert refused.status_code == 403 and "match ours-*" in refused.json()["error"]["message"]
    assert (await world.ours.post("/v1/experiments", json=definition("ours-x", "ours-alias", OURS))).status_code == 201
    renamed = await world.ours.patch("/v1/experiments/ours-x", json={"name": "zeta-test", "reason": "x"})
    assert renamed.status_code == 403
    anyone = world.running.client(Scope.EXPERIMENTS)
    await asyncio.sleep(1)
    assert (await anyone.post("/v1/experiments", json=definition("free", "any-alias"))).status_code == 201
    assert (await anyone.post("/v1/experiments", json=definition("zeta-test", "any-alias"))).status_code == 409


@pytest.mark.asyncio(loop_scope="module")
async def test_what_holds_an_adapter_is_named_to_those_who_reach_it(world: World):
    """An administrator's alias beyond the key's reach stands on the key's adapter."""
    anyone = world.running.client(Scope.ADMIN)
    await asyncio.sleep(1)
    (await anyone.put("/v1/aliases/secret-plan", json={"target": "ours-b"})).raise_for_status()
    version = (await world.ours.get("/v1/adapters/ours-b")).json()["version"]
    for path in ("/v1/adapters/ours-b", f"/v1/adapters/ours-b/versions/{version}"):
        refused = await world.ours.delete(path)
        assert refused.status_code == 409 and "secret" not in refused.text
        assert "secret-plan" in (await anyone.delete(path)).text
