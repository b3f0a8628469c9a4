"""The demo through the front door with vLLM as its engine: every adapter, the sum, the head, all at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import httpx
import pytest

from lora_runtime.zoo.paths import BASE_NAME, COMBINATIONS
from lora_runtime.zoo.tasks import TASK_OF_ADAPTER, examples
from tests.http.test_zoo import is_right
from tests.served import Served, served

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here; `make test-vllm` installs it"),
]
COUNT = 15


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    options = {"max_slots": 4, "max_batch_size": 8, "max_images": 2, "max_model_len": 512, "dtype": "float32"}
    with served(tmp_path_factory.mktemp("vllm"), {"engine": {"kind": "vllm", "options": options}}) as running:
        yield running


def test_accuracy_through_http(service: Served):
    asked = [(BASE_NAME, "colour"), *TASK_OF_ADAPTER.items()]
    asked += [(model, task) for model, tasks in COMBINATIONS.items() for task in tasks]
    work = [(model, task, example) for model, task in asked for example in examples(task, "heldout", COUNT)]
    order = [one for start in range(7) for one in work[start::7]]
    with httpx.Client(base_url=service.url, timeout=120) as http, ThreadPoolExecutor(12) as pool:
        right = list(pool.map(lambda one: is_right(http, *one), order))
    score = {key: sum(r for r, one in zip(right, order, strict=True) if one[:2] == key) / COUNT for key in asked}
    for (model, task), accuracy in score.items():
        print(f"{model:24} {task:8} {accuracy:6.1%}")
    assert min(score.values()) >= 0.85


def test_a_client_that_leaves_frees_its_slot(service: Served):
    body = {"model": "letter", "prompt": "hello", "max_tokens": 400, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
    with httpx.Client(base_url=service.url, timeout=60) as http:
        body = {"model": "letter", "prompt": "hello", "max_tokens": 2}
        assert http.post("/v1/completions", json=body).status_code == 200
        assert http.get("/readyz").status_code == 200
