"""Each adapter of the shipped zoo, and sums of them, in one mixed batch: equal to PEFT alone, to dense arithmetic."""

from __future__ import annotations

import asyncio
import io
import random

import pytest

from lora_runtime.engine.embedded.config import EmbeddedConfig
from lora_runtime.engine.embedded.engine import EmbeddedEngine
from lora_runtime.engine.protocol import ClassifyRequest
from lora_runtime.zoo import paths
from lora_runtime.zoo.classifier import with_head
from lora_runtime.zoo.tasks import TASK_OF_ADAPTER, WARMTH_LABELS, examples
from tests.oracle.asking import NUM_TOKENS, answer, close
from tests.oracle.world import World, chat, greedy, label_probabilities

GENERATING = tuple(name for name in paths.ADAPTER_NAMES if name != "warmth")
COMBINATIONS: tuple[dict[str, float], ...] = (
    {"shape": 1.0, "french": 1.0},
    {"size": 0.6, "fill": 0.6, "letter": 0.4},
    {"french": 0.5, "letter": 0.5},
    {"fill": 1.0, "size": -0.4},
    {"shape": 0.3, "size": 0.3, "fill": 0.3, "letter": -0.2, "french": 0.3},
)


class Zoo(World):
    def classifier(self):
        return with_head(self.load(), WARMTH_LABELS).eval()

    def peft(self, name):
        return super().peft("classifier" if name == "warmth" else name)


@pytest.fixture(scope="module")
def zoo():
    return Zoo(paths.BASE, {**paths.ADAPTERS, "classifier": paths.ADAPTERS["warmth"]})


@pytest.fixture(scope="module")
def prompts():
    """A held-out picture with each skill's question, and with the base's own."""

    def ask(task):
        example = examples(task, "heldout", 1)[0]
        file = io.BytesIO()
        example.image.save(file, "PNG")
        return chat(example.question, file.getvalue())

    return [ask(task) for task in ("colour", "code", *(TASK_OF_ADAPTER[name] for name in GENERATING))]


@pytest.fixture
async def engine(zoo):
    """Five slots for five adapters would prove little: three, so that adapters come and go; the widest sum has five."""
    engines = [EmbeddedEngine(EmbeddedConfig(base_path=str(zoo.base), max_slots=n, max_batch_size=6)) for n in (3, 5)]
    for each in engines:
        await each.start()
    yield engines
    for each in engines:
        await each.close()


@pytest.fixture(scope="module")
def oracle(zoo, prompts):
    probe = EmbeddedEngine(EmbeddedConfig(base_path=str(zoo.base)))
    prepared = [probe._prompts.prepare(prompt) for prompt in prompts]
    models = [((), zoo.load())]
    models += [(((name, 1.0),), zoo.peft(name)) for name in GENERATING]
    models += [(tuple(shares.items()), zoo.dense(shares)) for shares in COMBINATIONS]
    return {target: [greedy(model, p, NUM_TOKENS) for p in prepared] for target, model in models}


@pytest.mark.parametrize("seed", [0, 1])
async def test_every_adapter_and_five_sums_in_one_mixed_batch(engine, zoo, prompts, oracle, seed):
    """Shuffled, joining while others decode, some cancelled; sums of up to three on the engine with three slots."""
    work = [(target, number) for target in oracle for number in range(len(prompts))]
    random.Random(seed).shuffle(work)
    few, many = engine

    async def ask(target, number, delay):
        await asyncio.sleep(delay)
        chosen = few if len(target) <= 3 else many
        return await answer(chosen, prompts[number], tuple(zoo.ref(name, weight) for name, weight in target))

    async def leave_early(name, delay):
        await asyncio.sleep(delay)
        asking = asyncio.create_task(answer(few, prompts[0], (zoo.ref(name),), count=60))
        await asyncio.sleep(0.05)
        asking.cancel()

    leaving = [leave_early(name, i * 0.05) for i, name in enumerate(GENERATING)]
    answers, _ = await asyncio.gather(
        asyncio.gather(*(ask(t, n, i * 0.005) for i, (t, n) in enumerate(work))), asyncio.gather(*leaving)
    )
    for (target, number), got in zip(work, answers, strict=True):
        close(got, oracle[target][number], f"{target} on prompt {number}")
    counters = few.stats().counters
    assert counters["slot_evictions"] > 0 and counters["slot_hits"] > 0


async def test_the_classifier_in_the_same_batch(engine, zoo, prompts):
    request = ClassifyRequest(request_id="c", prompt=prompts[0], adapters=(zoo.ref("warmth"),))
    beside = [answer(engine[0], prompts[0], (zoo.ref(name),)) for name in ("letter", "french")]
    got, *_ = await asyncio.gather(engine[0].classify(request), *beside)
    want = label_probabilities(zoo.peft("warmth"), engine[0]._prompts.prepare(prompts[0]))
    assert got.labels == WARMTH_LABELS
    assert max(abs(a - b) for a, b in zip(got.probabilities, want, strict=True)) < 1e-5
