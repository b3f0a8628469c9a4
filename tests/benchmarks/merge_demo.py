"""What merges keep of the demo's skills: two adapters made one by each method, on both of their tasks.

    python -m tests.benchmarks.merge_demo [--first shape] [--second french] [--count 200]

Printed: the share of held-out pictures answered rightly, word for word, by the base, by each parent, and by the merge
of each method with both weights 1 (0.5 for means on the sphere), with the largest rank of its factors and the least
energy that a leaf kept. TIES and its kin average what agrees, so they are shown at twice that, too.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging as transformers_logging

from lora_runtime.checkpoint import read_adapter
from lora_runtime.dense import add_into
from lora_runtime.layout import BaseLayout
from lora_runtime.merge.adapters import merge
from lora_runtime.merge.recipe import Recipe
from lora_runtime.weights import AdapterWeights
from lora_runtime.zoo.batches import Batcher
from lora_runtime.zoo.check import answers_right
from lora_runtime.zoo.paths import ADAPTERS, BASE
from lora_runtime.zoo.tasks import TASK_OF_ADAPTER

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
    ("tsv", {}),
    ("iso_c", {}),
    ("slerp", {"scale": 2.0}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", default="shape")
    parser.add_argument("--second", default="french")
    parser.add_argument("--count", type=int, default=200)
    options = parser.parse_args()
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
    for method, more in METHODS:
        weight = 0.5 if method in ("slerp", "karcher") else 1.0
        inputs = [{"adapter": name, "weight": weight} for name in names]
        recipe = Recipe.model_validate({"method": method, "inputs": inputs, **more})
        found = merge(recipe, adapters, lambda leaf, parameter: own[f"{leaf}.{parameter}"].detach())
        rank = max(report.rank for report in found.leaves.values())
        energy = min(report.energy for report in found.leaves.values())
        said = ", ".join(f"{key} {value}" for key, value in more.items())
        row(f"{method} {said}".strip(), scored(found.weights), f"   rank {rank}, energy {energy:.2f}")


if __name__ == "__main__":
    main()
