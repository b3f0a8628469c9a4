"""A linear layer's product with prepacked weights beside torch's own, and the bytes a plain copy moves.

    python -m tests.benchmarks.linear [--threads 2]

Each product reads a weight that was not used lately, as layers of a model do. "of copy" is the weight's
bytes per second over a copy's: for few rows nothing can be faster than reading the weight once.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch

from lora_runtime.engine.matrix import Matrix

SHAPES = ((512, 512), (1408, 512), (512, 1408), (8192, 512))
ROWS = (1, 8, 64, 512)
SPREAD_BYTES = 128 << 20
"""More than the caches hold."""


def seconds(function: Callable[[], object], rounds: int = 30) -> float:
    taken = []
    for number in range(rounds + 3):
        start = time.perf_counter()
        function()
        if number >= 3:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    source, target = torch.empty(SPREAD_BYTES // 4), torch.empty(SPREAD_BYTES // 4)
    copied = SPREAD_BYTES / seconds(lambda: target.copy_(source))
    print(f"torch {torch.__version__}, {arguments.threads} threads, fp32; copy {copied / 1e9:.1f} GB/s")
    with torch.inference_mode():
        for width_out, width_in in SHAPES:
            num_bytes = width_out * width_in * 4
            weights = [torch.randn(width_out, width_in) for _ in range(max(2, SPREAD_BYTES // num_bytes))]
            matrices = [Matrix(weight, prepack=True) for weight in weights]
            for rows in ROWS:
                x = torch.randn(rows, width_in)
                plain_turn, packed_turn = itertools.cycle(weights), itertools.cycle(matrices)
                plain = seconds(lambda x=x, turn=plain_turn: torch.nn.functional.linear(x, next(turn)))
                packed = seconds(lambda x=x, turn=packed_turn: next(turn)(x))
                print(
                    f"({rows:3}, {width_in:4}) x ({width_in:4}, {width_out:4})  torch {plain * 1e6:6.0f} us  "
                    f"prepacked {packed * 1e6:6.0f} us  ratio {plain / packed:4.2f}  "
                    f"of copy {num_bytes / packed / copied:4.2f}"
                )


if __name__ == "__main__":
    main()
