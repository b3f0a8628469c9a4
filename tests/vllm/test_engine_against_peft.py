"""The vLLM engine against PEFT: each adapter loaded alone there, all of them in one mixed batch here."""

from __future__ import annotations

import asyncio
import random
from importlib.util import find_spec

import pytest
import pytest_asyncio

from lora_runtime.engine.protocol import ClassifyRequest
from lora_runtime.engine.vllm.config import VllmConfig
from tests.oracle.answers import PROMPTS, Answers, oracle_answers, prepare
from tests.oracle.asking import answer, close
from tests.oracle.world import LABELS, World, build_world, chat, label_probabilities, picture

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here; `make test-vllm` installs it"),
]
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def oracle(world: World) -> Answers:
    return oracle_answers(world)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(world: World):
    """18 adapters on 4 slots, 6 requests at once, prompts in several chunks."""
    from lora_runtime.engine.vllm.engine import VllmEngine

    config = VllmConfig(
        base_path=str(world.base), dtype="float32", max_model_len=512, max_batch_size=6, max_batched_tokens=64,
        max_slots=4, max_images=2,
    )  # fmt: skip
    running = VllmEngine(config)
    await running.start()
    yield running
    await running.close()


@pytest.mark.parametrize("seed", [0, 1, 2])
async def test_one_mixed_batch_equals_peft_row_by_row(engine, world, oracle, seed):
    """Base, every family and five combinations, in shuffled order; from the second round the prefix cache is warm."""
    work = [(target, number) for target in oracle for number in range(len(PROMPTS))]
    random.Random(seed).shuffle(work)

    async def ask(target, number, delay):
        await asyncio.sleep(delay)
        return await answer(engine, PROMPTS[number], tuple(world.ref(name, weight) for name, weight in target))

    answers = await asyncio.gather(*(ask(t, n, i * 0.002) for i, (t, n) in enumerate(work)))
    for (target, number), got in zip(work, answers, strict=True):
        close(got, oracle[target][number], f"{target} on prompt {number}", TOLERANCE)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.held_slots, stats.kv_used_tokens) == (0, 0, 0, 0)
    assert stats.counters["slot_evictions"] > 0


@pytest.mark.parametrize("share", [1.0, 0.5])
async def test_label_probabilities_equal_peft(engine, world, share):
    prompt = chat("Which animal?", picture(5))
    request = ClassifyRequest(request_id="c", prompt=prompt, adapters=(world.ref("classifier", share),))
    generating = [answer(engine, prompt, (world.ref(name),)) for name in ("plain", "saved_head")]
    got, *_ = await asyncio.gather(engine.classify(request), *generating)
    assert got.labels == LABELS
    assert abs(sum(got.probabilities) - 1) < 1e-5
    if share == 1.0:
        want = label_probabilities(world.peft("classifier"), prepare(world, prompt))
        assert max(abs(a - b) for a, b in zip(got.probabilities, want, strict=True)) < 1e-5
