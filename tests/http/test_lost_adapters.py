"""A registered adapter whose entry in the store is gone, as after a restored backup: the service's fault, said to
whoever asks for it, and nobody else's trouble."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import httpx
import pytest
from safetensors.torch import load_file, save

from lora_runtime.folder import CONFIG_NAME, TENSORS_NAME
from lora_runtime.zoo.paths import ADAPTERS
from lora_runtime.zoo.tasks import examples
from tests.http.test_zoo import is_right, messages
from tests.served import Served


@pytest.fixture
def demo(zoo: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=zoo.url, timeout=120) as client:
        yield client


def upload(http: httpx.Client, name: str) -> httpx.Response:
    """A version that no other adapter has, and no engine has read."""
    tensors = load_file(ADAPTERS["shape"] / TENSORS_NAME)
    changed = save({key: tensor * 0.99 for key, tensor in tensors.items()})
    files = {TENSORS_NAME: changed, CONFIG_NAME: (ADAPTERS["shape"] / CONFIG_NAME).read_bytes()}
    return http.post(f"/v1/adapters/{name}/versions", files=[("files", (file, files[file])) for file in files])


def test_files_that_are_gone_are_the_services_fault_and_trouble_nobody_else(demo: httpx.Client, zoo: Served):
    version = upload(demo, "lost").json()["version"]
    shutil.rmtree(zoo.log.parent / "state" / "store" / "versions" / version)
    example = examples("french", "heldout", 1)[0]
    for model in ("lost", "lost:0.5+french:0.5"):
        refused = demo.post("/v1/chat/completions", json={"model": model, "messages": messages(example)})
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["type"]) == (500, "version_damaged", "server_error"), error
        assert "'lost@" in error["message"] and "upload the same adapter again" in error["message"]
    assert is_right(demo, "french", "french", example)
    assert demo.get("/readyz").status_code == 200
    assert demo.get("/v1/adapters/lost").json()["version"] == version
    assert upload(demo, "lost").status_code == 200, "known content, which the store gets back"
    mended = demo.post("/v1/chat/completions", json={"model": "lost", "messages": messages(example)})
    assert mended.status_code == 200, mended.text
    assert demo.delete("/v1/adapters/lost").status_code == 200
