"""A random base with an adapter of every family, made once a session, and an engine on it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from lora_runtime.engine.embedded.config import EmbeddedConfig
from lora_runtime.engine.embedded.engine import EmbeddedEngine
from tests.oracle.world import World, build_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def tied_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("tied"), tie=True)


@pytest.fixture
async def engine(world: World) -> AsyncIterator[EmbeddedEngine]:
    """18 adapters on 4 slots, requests on 6 lanes, prompts in several chunks."""
    config = EmbeddedConfig(base_path=str(world.base), max_batch_size=6, max_batched_tokens=64, max_slots=4)
    running = EmbeddedEngine(config)
    await running.start()
    yield running
    await running.close()
