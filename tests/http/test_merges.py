"""Merges over HTTP, on a real service: what is asked for is made, served at once, and refused in one clear error."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoModelForImageTextToText

from lora_runtime.zoo.paths import BASE
from lora_runtime.zoo.tasks import examples
from tests.http.test_zoo import is_right
from tests.served import Served

ENDED = ("succeeded", "failed", "cancelled")
BOTH = [{"adapter": "shape"}, {"adapter": "french"}]


@pytest.fixture(scope="module")
def http(zoo: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=zoo.url, timeout=120) as client:
        yield client


def merge(http: httpx.Client, **recipe: Any) -> httpx.Response:
    return http.post("/v1/merges", json=recipe)


def ended(http: httpx.Client, answer: httpx.Response, seconds: float = 200) -> dict[str, Any]:
    assert answer.status_code == 202, answer.text
    deadline = time.monotonic() + seconds
    while (job := http.get(f"/v1/merges/{answer.json()['id']}").json())["state"] not in ENDED:
        assert time.monotonic() < deadline, job
        time.sleep(0.3)
    return job


def state_of(zoo: Served) -> Path:
    return zoo.log.parent / "state"


def test_a_merge_is_served_as_soon_as_it_is_made(http: httpx.Client, zoo: Served):
    recipe = {"name": "both", "method": "cat", "inputs": BOTH}
    plan = http.post("/v1/merges/plan", json=recipe).json()
    assert plan["num_tasks"] == 1 and plan["base"] == "loom-zoo/base" and plan["warnings"] == []
    assert [found["adapter"] for found in plan["inputs"]] == ["shape", "french"]
    job = ended(http, merge(http, **recipe))
    assert job["state"] == "succeeded" and job["progress"] == 1.0, job["error"]
    probe = job["report"]["verification"]["probe"]
    assert probe["kl_to_expected"] < 1e-6 < 0.1 < probe["kl_to_base"]
    assert [task["state"] for task in job["tasks"]] == ["done"] * 3
    adapter = http.get("/v1/adapters/both").json()
    assert job["report"]["registered"] == f"both@{adapter['version']}"
    parents = adapter["info"]["merge"]["parents"]
    versions = {name: http.get(f"/v1/adapters/{name}").json()["version"] for name in ("shape", "french")}
    assert {found["adapter"]: found["version"] for found in parents} == versions
    assert adapter["info"]["merge"]["job"] == job["id"]
    for task in ("shape", "french"):
        right = [is_right(http, "both", task, example) for example in examples(task, "heldout", 8)]
        assert sum(right) >= 7, task
    lines = [line["message"] for line in http.get(f"/v1/merges/{job['id']}/logs").json()["data"]]
    assert lines[-1].startswith("Registered as both@") and any("part-00000 done on" in line for line in lines)
    assert not list((state_of(zoo) / "merges").glob("**/*"))
    assert http.get("/v1/merges", params={"state": "succeeded"}).json()["data"][0]["report"] is None


def test_the_same_merge_again_is_the_same_content(http: httpx.Client):
    turned = [{"adapter": "french"}, {"adapter": "shape"}]
    first = ended(http, merge(http, name="again", method="ties", inputs=BOTH, density=0.7, scale=2.0))
    other = ended(http, merge(http, name="again", method="ties", inputs=turned, density=0.7, scale=2.0))
    assert first["report"]["registered"] == other["report"]["registered"]
    assert http.get("/v1/adapters/again").json()["num_versions"] == 1
    third = ended(http, merge(http, name="again", method="svd", rank=4, inputs=BOTH, activate=False))
    assert 0 < third["report"]["kept_energy"]["least"] < 1
    assert any("truncated" in warning for warning in third["report"]["warnings"])
    assert http.get("/v1/adapters/again").json()["version"] in first["report"]["registered"]
    version = third["report"]["registered"].partition("@")[2]
    assert http.get(f"/v1/adapters/again/versions/{version}").status_code == 200


def test_a_checkpoint_is_made_of_the_base(http: httpx.Client):
    recipe = {"name": "shape-full", "product": "checkpoint", "method": "linear", "inputs": BOTH[:1]}
    answer = http.post("/v1/merges", json=recipe, headers={"Idempotency-Key": "once"})
    again = http.post("/v1/merges", json=recipe, headers={"Idempotency-Key": "once"})
    assert again.json()["id"] == answer.json()["id"]
    job = ended(http, answer)
    assert job["state"] == "succeeded", job["error"]
    found = http.get("/v1/checkpoints/shape-full").json()
    assert found["base"] == "loom-zoo/base" and found["merge"] == job["id"] and list(found["parents"]) == ["shape"]
    folder = Path(found["location"])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["sha256"] == found["version"] and manifest["semantics"] == "linear/2"
    assert {file.name for file in BASE.iterdir()} == {file.name for file in folder.iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == {file.name for file in BASE.iterdir()}
    AutoModelForImageTextToText.from_pretrained(folder)
    taken = merge(http, **recipe)
    assert taken.status_code == 400 and "'shape-full' exists already" in taken.json()["error"]["message"]
    assert [found["id"] for found in http.get("/v1/checkpoints").json()["data"]] == ["shape-full"]
    assert http.get("/v1/checkpoints/other").status_code == 404


@pytest.mark.slow
def test_weights_are_searched_for_on_live_engines(http: httpx.Client, examples_root: Path):
    lines = []
    for task in ("shape", "french"):
        for number, example in enumerate(examples(task, "heldout", 6)):
            example.image.save(examples_root / f"{task}-{number}.png")
            lines.append(
                {
                    "prompt": example.question, "image": f"{task}-{number}.png",
                    "answer": example.answer, "task": task,
                }
            )  # fmt: skip
    (examples_root / "skills.jsonl").write_text("\n".join(map(json.dumps, lines)))
    search = {"examples": str(examples_root / "skills.jsonl"), "trials": 6, "held_out": 0.34, "max_tokens": 16}
    job = ended(http, merge(http, name="searched", method="cat", inputs=BOTH, search=search))
    assert job["state"] == "succeeded", job["error"]
    assert len(job["trials"]) == 6
    found = job["report"]["search"]
    assert found["num_search"] == 8 and found["num_held_out"] == 4
    assert found["winner"]["search"] == max(trial["score"] for trial in job["trials"]) >= 0.9
    weights = {found["adapter"]: found["weight"] for found in job["recipe"]["inputs"]}
    assert weights == found["winner"]["weights"]
    outside = merge(http, name="searched", method="cat", inputs=BOTH, search={**search, "examples": "/etc/passwd"})
    assert outside.status_code == 400 and "merges.roots" in outside.json()["error"]["message"]
    missing = {**search, "examples": str(examples_root / "none.jsonl")}
    absent = merge(http, name="searched", method="cat", inputs=BOTH, search=missing)
    assert absent.status_code == 400 and "search.examples" in absent.json()["error"]["message"]


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"inputs": [{"adapter": "shpe"}]}, "no model or adapter 'shpe'. Did you mean shape"),
        ({"inputs": [{"adapter": "shape@0123"}]}, "'shape' has no version or alias '0123'"),
        ({"inputs": [{"adapter": "shape:0.5"}]}, "give its weight as 'weight'"),
        ({"inputs": [{"adapter": "shape", "weight": 0}]}, "Every weight is 0"),
        ({"inputs": [{"adapter": "shape"}, {"adapter": "shape"}]}, "named twice"),
        ({"inputs": [{"adapter": "shape"}, {"adapter": "shape@latest"}]}, "one content under two names"),
        ({"inputs": []}, "at least 1 item"),
        ({"inputs": BOTH, "method": "magic"}, "method"),
        ({"inputs": BOTH, "densty": 0.5}, "densty"),
        ({"inputs": [{"adapter": "shape", "weight": 1e9}]}, "inputs[0].weight"),
        ({"inputs": [{"adapter": "shape", "weight": -1}, {"adapter": "french"}], "method": "slerp"}, "above 0 only"),
        ({"inputs": [{"adapter": "warmth"}], "product": "checkpoint"}, "head 'score', for which"),
        ({"inputs": BOTH, "name": "loom/zoo"}, "name"),
        ({"inputs": BOTH, "search": {"examples": "x"}, "method": "ties"}, "merge by cat, linear or svd"),
    ],
)
def test_bad_recipes_get_one_clear_error_and_leave_nothing(http: httpx.Client, zoo: Served, recipe, said: str):
    before = len(http.get("/v1/merges").json()["data"])
    body = {"name": "bad", "method": "linear", **recipe}
    answer = merge(http, **body)
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["error"]["message"]
    assert len(http.get("/v1/merges").json()["data"]) == before
    assert http.get("/v1/adapters/bad").status_code == 404
    assert "bad" not in {path.name for path in (state_of(zoo) / "merges").glob("*")}


def test_nan_is_no_weight(http: httpx.Client):
    content = '{"name": "bad", "method": "linear", "inputs": [{"adapter": "shape", "weight": NaN}]}'
    answer = http.post("/v1/merges", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400


def test_several_problems_are_told_together(http: httpx.Client):
    inputs = [{"adapter": "shpe"}, {"adapter": "frnch"}, {"adapter": "shape"}]
    message = merge(http, name="bad", method="linear", inputs=inputs).json()["error"]["message"]
    assert "(1)" in message and "'shpe'" in message and "(2)" in message and "'frnch'" in message


def test_a_cancelled_merge_leaves_nothing(http: httpx.Client, zoo: Served):
    answer = merge(http, name="stopped", product="checkpoint", method="linear", inputs=BOTH)
    assert merge(http, name="stopped", product="checkpoint", method="linear", inputs=BOTH).status_code == 409
    assert http.post(f"/v1/merges/{answer.json()['id']}/cancel").status_code == 200
    job = ended(http, answer)
    assert job["state"] == "cancelled" and job["error"] is None
    assert http.get("/v1/checkpoints/stopped").status_code == 404
    assert {path.name for path in (state_of(zoo) / "merges").glob("*")} <= {"shape-full"}
    assert http.post("/v1/merges/merge_0/cancel").status_code == 404
    assert http.get("/v1/merges/merge_0").status_code == 404
