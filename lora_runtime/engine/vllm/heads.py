"""Classification heads in vLLM: for a row that asks for one, the head's logits take the vocabulary's place.

Label i becomes token i, every other token impossible; one greedy token with the log-probabilities of all
labels is then the whole answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_runtime.combine import sum_heads
from lora_runtime.engine.vllm.binding import Binding
from lora_runtime.weights import Head


class HeadLogits:
    """Heads by slot, and the rows of the step that want one."""

    def __init__(self, model: Any) -> None:
        """Replaces ``model.compute_logits``."""
        self._by_slot: dict[int, Mapping[str, Head]] = {}
        self._rows: list[tuple[int, Binding]] = []
        self._compute = model.compute_logits
        model.compute_logits = self._with_heads

    def fill(self, slot: int, heads: Mapping[str, Head]) -> None:
        self._by_slot[slot] = heads

    def clear(self, slot: int) -> None:
        self._by_slot.pop(slot, None)

    def route(self, bindings: Sequence[Binding]) -> None:
        """The bindings of the rows whose logits are computed next."""
        self._rows = [(row, binding) for row, binding in enumerate(bindings) if binding.head is not None]

    def _with_heads(self, hidden: Tensor, *arguments: Any, **options: Any) -> Tensor | None:
        logits: Tensor | None = self._compute(hidden, *arguments, **options)
        if logits is None:
            return None
        for row, binding in self._rows:
            assert binding.head is not None
            head = sum_heads(
                binding.head,
                [
                    (self._by_slot[slot][binding.head], weight)
                    for slot, weight in binding.signature
                    if binding.head in self._by_slot.get(slot, {})
                ],
            )
            bias = None if head.bias is None else head.bias.to(hidden.device, torch.float32)
            weight = head.weight.to(hidden.device, torch.float32)
            scores = torch.nn.functional.linear(hidden[row].float(), weight, bias)
            logits[row] = float("-inf")
            logits[row, : len(head.labels)] = scores.to(logits.dtype)
        return logits
