"""A search for weights on the demo's world: requests to a live engine, and the winner merged to what they had said."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from lora_runtime.checkpoint import read_adapter
from lora_runtime.engine.factory import create_engine
from lora_runtime.engine.protocol import AdapterRef, Engine
from lora_runtime.export import write_adapter
from lora_runtime.layout import BaseLayout
from lora_runtime.merge.adapters import merge
from lora_runtime.merge.evaluating import batched, engine_evaluator
from lora_runtime.merge.examples import Example, read_examples
from lora_runtime.merge.recipe import Recipe
from lora_runtime.merge.search import Search, search
from lora_runtime.parameters import BaseParameters
from lora_runtime.zoo.paths import ADAPTERS, BASE, BASE_NAME
from lora_runtime.zoo.tasks import TASK_OF_ADAPTER, Split
from lora_runtime.zoo.tasks import examples as pictures

NAMES = ("shape", "french")


def written(folder: Path, tasks: Sequence[str], split: Split, count: int) -> Path:
    """A file of ``count`` examples of each task, its pictures beside it."""
    lines = []
    for task in tasks:
        for number, example in enumerate(pictures(task, split, count)):
            example.image.save(folder / f"{task}-{number}.png")
            asked = {"prompt": example.question, "image": f"{task}-{number}.png"}
            lines.append(json.dumps({**asked, "answer": example.answer, "task": task}))
    path = folder / "examples.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def zoo_examples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Example, ...]:
    tasks = [TASK_OF_ADAPTER[name] for name in NAMES]
    return read_examples(written(tmp_path_factory.mktemp("examples"), tasks, "train", 8))


@pytest.fixture
async def zoo_engine() -> AsyncIterator[Engine]:
    engine = create_engine("embedded", {"base_path": str(BASE), "num_threads": 1})
    await engine.start()
    yield engine
    await engine.close()


async def refs_of(engine: Engine) -> dict[str, AdapterRef]:
    return {
        name: AdapterRef(version=(await engine.examine(str(path))).version, path=str(path), name=name)
        for name, path in ADAPTERS.items()
        if name in NAMES
    }


async def test_a_search_on_a_live_engine(zoo_engine: Engine, zoo_examples: tuple[Example, ...], tmp_path: Path):
    refs = await refs_of(zoo_engine)
    evaluate = engine_evaluator(batched(zoo_engine), refs, max_tokens=16, at_once=16)
    spec = Search(examples="examples.jsonl", trials=6, held_out=0.5)
    found = await search(spec, NAMES, zoo_examples, evaluate)
    plain = {baseline.name: baseline for baseline in found.baselines}
    # Each skill alone is right on its own task and on nothing of the other's; french was trained to go with shape.
    for name, task in TASK_OF_ADAPTER.items():
        if name in NAMES:
            alone = plain[f"{name} alone"].held_out_tasks
            assert alone[task] >= 0.75 and all(score <= 0.25 for other, score in alone.items() if other != task)
    assert found.winner.search >= plain["all 1"].search > plain["mean"].search
    assert found.winner.held_out >= 0.75

    known = found.trials[:5]
    assert await search(spec, NAMES, zoo_examples, evaluate, known=known) == found

    inputs = [{"adapter": name, "weight": weight} for name, weight in found.winner.weights.items() if weight]
    layout = BaseLayout.from_config(str(BASE))
    adapters = {name: read_adapter(ADAPTERS[name], layout) for name in NAMES}
    merged = merge(Recipe.model_validate({"method": "cat", "inputs": inputs}), adapters, BaseParameters(BASE))
    write_adapter(merged.weights, tmp_path / "winner", layout, base_name=BASE_NAME)
    winner = AdapterRef(
        version=(await zoo_engine.examine(str(tmp_path / "winner"))).version,
        path=str(tmp_path / "winner"),
        name="winner",
    )
    of_merge = engine_evaluator(batched(zoo_engine), {"winner": winner}, max_tokens=16, at_once=16)
    assert await of_merge({"winner": 1.0}, zoo_examples) == await evaluate(found.winner.weights, zoo_examples), (
        "what was built answers as what was tried"
    )
    stats = zoo_engine.stats()
    assert (stats.running, stats.waiting, stats.held_slots) == (0, 0, 0)
