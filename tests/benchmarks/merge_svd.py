"""Merging three adapters at a rank, at the shapes of Qwen2-VL-7B: here, and by PEFT's svd. CPU time of one thread.

    python -m tests.benchmarks.merge_svd [--mlp]

Both merge the same random adapters of rank 16 with the weights 0.5, 0.3 and 0.2 into one of rank 16, one matrix after
the other. PEFT makes each delta in full and decomposes it; here the factors are decomposed. Printed: CPU seconds of
both, their ratio, and how far the two results are from each other. ``--mlp`` adds an MLP matrix, which takes PEFT many
minutes and 3 GB.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lora_runtime.merge.adapters import merge
from lora_runtime.merge.recipe import Recipe
from lora_runtime.weights import AdapterWeights, LoraFactors

RANK = 16
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}
SHAPES = {"k_proj": (512, 3584), "q_proj": (3584, 3584)}
MLP = {"gate_proj": (18944, 3584)}

Result = TypeVar("Result")


def cpu_seconds(call: Callable[[], Result]) -> tuple[Result, float]:
    begun = time.process_time()
    result = call()
    return result, time.process_time() - begun


class OneLayer(nn.Module):
    """A model of one linear layer, without memory for its weight's values until PEFT asks."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.layer = nn.Linear(columns, rows, bias=False)


def by_peft(adapters: dict[str, LoraFactors], rows: int, columns: int) -> tuple[Tensor, float]:
    model = None
    for name, factors in adapters.items():
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["layer"])
        if model is None:
            model = get_peft_model(OneLayer(rows, columns), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        layer = model.base_model.model.layer
        layer.lora_A[name].weight.data.copy_(factors.a)
        layer.lora_B[name].weight.data.copy_(factors.b)
    assert model is not None
    names, weights = list(WEIGHTS), list(WEIGHTS.values())
    with torch.no_grad():
        _, seconds = cpu_seconds(
            lambda: model.add_weighted_adapter(names, weights, "merged", combination_type="svd", svd_rank=RANK)
        )
        return layer.get_delta_weight("merged"), seconds


def by_loom(adapters: dict[str, LoraFactors]) -> tuple[Tensor, float]:
    inputs = [{"adapter": name, "weight": weight} for name, weight in WEIGHTS.items()]
    recipe = Recipe.model_validate({"method": "svd", "inputs": inputs, "rank": RANK})
    members = {name: AdapterWeights(version=name, lora={"layer": factors}) for name, factors in adapters.items()}
    merge(recipe, members, lambda *_: torch.zeros(()))  # the first call of LAPACK loads it
    found, seconds = cpu_seconds(lambda: merge(recipe, members, lambda *_: torch.zeros(())))
    return found.weights.lora["layer"].delta(), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mlp", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    total_peft = total_loom = 0.0
    for name, (rows, columns) in (SHAPES | (MLP if options.mlp else {})).items():
        adapters = {
            which: LoraFactors(
                a=torch.randn(RANK, columns, generator=generator) / columns**0.5,
                b=torch.randn(rows, RANK, generator=generator),
                scaling=1.0,
            )
            for which in WEIGHTS
        }
        ours, loom = by_loom(adapters)
        theirs, peft = by_peft(adapters, rows, columns)
        apart = float((ours - theirs).norm() / theirs.norm())
        total_peft, total_loom = total_peft + peft, total_loom + loom
        print(
            f"{name:10} {rows} x {columns}: PEFT {peft:8.2f} s, here {1000 * loom:7.2f} ms, {peft / loom:6.0f} times; "
            f"apart by {apart:.1e}"
        )
    print(f"together: {total_peft / total_loom:.0f} times less CPU time (asked: 500)")


if __name__ == "__main__":
    main()
