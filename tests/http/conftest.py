"""One service on the fake engine for everything about HTTP itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.fakes import write_fake_adapter
from tests.served import Served, served


@pytest.fixture(scope="session")
def adapter_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for name in ("french", "shape", "animals"):
        write_fake_adapter(root / name, name=name, head=name == "animals")
    return root


@pytest.fixture(scope="session")
def fake(tmp_path_factory: pytest.TempPathFactory, adapter_root: Path) -> Iterator[Served]:
    settings = {
        "base": {"name": "base"},
        "engine": {"kind": "fake", "options": {"token_s": 0.01, "max_running": 12, "max_model_len": 500}},
        "adapters": {
            "roots": [str(adapter_root)],
            "preload": {name: str(adapter_root / name) for name in ("french", "shape", "animals")},
        },
        "engines": {"max_ongoing_requests": 14, "max_queued_requests": 4, "num_cpus": 0.5},
    }
    with served(tmp_path_factory.mktemp("fake"), settings) as running:
        yield running


@pytest.fixture(scope="session")
def http(fake: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fake.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def client(fake: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{fake.url}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="session")
def examples_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that searches may read examples from."""
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory, examples_root: Path) -> Iterator[Served]:
    settings = {
        "engine": {"options": {"max_slots": 4, "max_batch_size": 8, "max_images": 8}},
        "merges": {"roots": [str(examples_root)]},
    }
    with served(tmp_path_factory.mktemp("zoo"), settings) as running:
        yield running
