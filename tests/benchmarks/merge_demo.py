"""What merges keep of the demo's skills: two adapters made one by each method, on both of their tasks.

    python -m tests.benchmarks.merge_demo [--first shape] [--second french] [--count 200] [--trials 40]

Printed: the share of held-out pictures answered rightly, word for word, by the base, by each parent, and by the merge
of each method with both weights 1 (0.5 for means on the sphere), with the largest rank of its factors and the least
energy that a leaf kept. TIES and its kin, and RobustMerge, average what they keep, so they are shown at twice that,
too. Last, weights that a search found, merged: it asked the embedded engine about ``--search-count`` pictures of each
task, none of which the table scores.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging as transformers_logging

from lora_runtime.checkpoint import read_adapter
from lora_runtime.dense import add_into
from lora_runtime.engine.factory import create_engine
from lora_runtime.engine.protocol import AdapterRef
from lora_runtime.layout import BaseLayout
from lora_runtime.merge.adapters import merge
from lora_runtime.merge.evaluating import batched, engine_evaluator
from lora_runtime.merge.examples import read_examples
from lora_runtime.merge.recipe import Recipe
from lora_runtime.merge.search import Search, SearchResult, search
from lora_runtime.weights import AdapterWeights
from lora_runtime.zoo.batches import Batcher
from lora_runtime.zoo.check import answers_right
from lora_runtime.zoo.paths import ADAPTERS, BASE
from lora_runtime.zoo.tasks import TASK_OF_ADAPTER
from tests.oracle.test_search import written

METHODS: tuple[tuple[str, dict[str, object]], ...] = (
    ("cat", {}),
    ("linear", {}),
    ("svd", {}),
    ("svd", {"rank": 4}),
    ("magnitude_prune", {"density": 0.7}),
    ("ties", {"density": 0.7}),
    ("ties", {"density": 0.7, "scale": 2.0}),
    ("ties", {"density": 0.7, "scale": 2.0, "convention": "peft"}),
    ("ties", {"density": 0.7, "scale": 2.0, "space": "full"}),
    ("dare_linear", {"density": 0.7}),
    ("dare_linear", {"density": 0.9}),
    ("dare_ties", {"density": 0.9, "scale": 2.0}),
    ("della", {"density": 0.9, "epsilon": 0.1, "scale": 2.0}),
    ("breadcrumbs", {"density": 0.9, "gamma": 0.0}),
    ("breadcrumbs", {"density": 0.7, "space": "full"}),
    ("core_tsv", {}),
    ("iso_c", {}),
    ("robust_merge", {"density": 0.2, "scale": 4.0}),
    ("robust_merge", {"density": 0.7, "scale": 2.0}),
    ("robust_merge", {"density": 0.7, "scale": 2.0, "space": "full"}),
    ("slerp", {"scale": 2.0}),
    ("karcher", {"scale": 2.0}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", default="shape")
    parser.add_argument("--second", default="french")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--search-count", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    names = options.first, options.second
    tasks = [TASK_OF_ADAPTER[name] for name in names]
    batcher = Batcher(AutoTokenizer.from_pretrained(BASE), Qwen2VLImageProcessorPil.from_pretrained(BASE))

    def base() -> Qwen2VLForConditionalGeneration:
        return Qwen2VLForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32).eval()

    model = base()
    layout, own = BaseLayout.from_model(model), dict(model.named_parameters())
    adapters = {name: read_adapter(ADAPTERS[name], layout) for name in names}

    def scored(weights: AdapterWeights | None) -> list[float]:
        changed = base()
        if weights is not None:
            add_into(changed, weights)
        return [answers_right(changed, batcher, task, options.count) for task in tasks]

    def row(what: str, scores: list[float], rest: str = "") -> None:
        print(f"{what:44}" + "".join(f"{score:9.1%}" for score in scores) + rest)

    print(f"{'':44}" + "".join(f"{task:>9}" for task in tasks))
    row("base", scored(None))
    for name, weights in adapters.items():
        row(name, scored(weights))

    def merged(what: str, method: str, shares: dict[str, float], more: dict[str, object]) -> None:
        inputs = [{"adapter": name, "weight": weight} for name, weight in shares.items()]
        recipe = Recipe.model_validate({"method": method, "inputs": inputs, **more})
        found = merge(recipe, adapters, lambda leaf, parameter: own[f"{leaf}.{parameter}"].detach())
        rank = max(report.rank for report in found.leaves.values())
        energy = min(report.energy for report in found.leaves.values())
        row(what, scored(found.weights), f"   rank {rank}, energy {energy:.2f}")

    for method, more in METHODS:
        said = ", ".join(f"{key} {value}" for key, value in more.items())
        weight = 0.5 if method in ("slerp", "karcher") else 1.0
        merged(f"{method} {said}".strip(), method, dict.fromkeys(names, weight), more)
    began = time.perf_counter()
    result = asyncio.run(searched(names, tasks, options.trials, options.search_count))
    took_s = time.perf_counter() - began
    weights_found = {name: weight for name, weight in result.winner.weights.items() if weight}
    said = ", ".join(f"{name} {weight:.4g}" for name, weight in weights_found.items())
    merged(f"cat searched: {said}", "cat", weights_found, {})
    print(f"\n{result.optimiser}: {len(result.trials)} trials of {result.num_search} examples in {took_s:.0f} s")
    print(f"{'':44}{'search':>9}{'held out':>9}   of the search's own examples")
    for candidate in (result.winner, *result.baselines):
        print(f"{candidate.name:44}{candidate.search:9.1%}{candidate.held_out:9.1%}")


async def searched(names: Sequence[str], tasks: Sequence[str], trials: int, count: int) -> SearchResult:
    """Weights by asking a live engine, on the split that the zoo was trained on and the table has no picture of."""
    engine = create_engine("embedded", {"base_path": str(BASE), "num_threads": 1})
    await engine.start()
    try:
        refs = {}
        for name in names:
            path = str(ADAPTERS[name])
            refs[name] = AdapterRef(version=(await engine.examine(path)).version, path=path, name=name)
        with TemporaryDirectory() as folder:
            examples = read_examples(written(Path(folder), tasks, "train", count))
        evaluate = engine_evaluator(batched(engine), refs, max_tokens=16, at_once=16)
        spec = Search(examples="examples.jsonl", trials=trials, held_out=0.3)
        return await search(spec, names, examples, evaluate)
    finally:
        await engine.close()


if __name__ == "__main__":
    main()
