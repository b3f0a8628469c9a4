"""The random world, its oracle, and vLLM engines on it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio

from lora_runtime.engine.vllm.config import VllmConfig
from tests.oracle.answers import Answers, oracle_answers
from tests.oracle.world import World, build_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def oracle(world: World) -> Answers:
    return oracle_answers(world)


@asynccontextmanager
async def running(world: World, **options: Any) -> AsyncIterator[Any]:
    """An engine with few slots and small steps, so that adapters come and go and prompts take several chunks."""
    from lora_runtime.engine.vllm.engine import VllmEngine

    settings = {"max_model_len": 512, "max_batch_size": 6, "max_batched_tokens": 64, "max_slots": 4, "max_images": 2}
    engine = VllmEngine(VllmConfig(base_path=str(world.base), dtype="float32", **{**settings, **options}))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(world: World) -> AsyncIterator[Any]:
    async with running(world) as started:
        yield started
