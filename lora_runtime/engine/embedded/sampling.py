"""Choosing the next token of each row from its logits.

Shape legend: B rows, V vocabulary, k alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_runtime.engine.protocol import Sampling


class RowSampler:
    """One choice's sampling: its settings and its own source of randomness.

    With a seed, the noise depends on (seed, choice, position) alone: the same request gives the
    same answer whatever shares its batch. Noise is drawn on the CPU so that devices agree.
    """

    def __init__(self, settings: Sampling, choice: int) -> None:
        self.settings = settings
        self._generator: torch.Generator | None = None
        if settings.temperature > 0:
            self._generator = torch.Generator()
            if settings.seed is None:
                self._generator.seed()
            else:
                # Generators take 64 bits; a large odd stride keeps choices of one seed apart.
                self._generator.manual_seed((settings.seed + choice * 0x9E3779B97F4A7C15) % (1 << 63))

    def draw(self, logits: Tensor) -> int:
        """``logits`` (V,) fp32. Greedy at temperature 0, else by the Gumbel-max trick (Maddison et al. 2014,
        arXiv 1411.0030) after temperature, top-k and top-p."""
        if self._generator is None:
            return int(logits.argmax())
        kept = _cut(logits / self.settings.temperature, self.settings.top_k, self.settings.top_p)
        noise = torch.empty(kept.shape, dtype=torch.float32).exponential_(generator=self._generator)
        return int((kept - noise.log().to(kept.device)).argmax())


def _cut(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Everything outside the ``top_k`` best, and outside the smallest set whose mass reaches ``top_p``,
    becomes -inf (Holtzman et al. 2019, arXiv 1904.09751). The best token always stays."""
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        beyond = before >= top_p
        beyond[0] = False
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(0, order, beyond), -torch.inf)
    return logits


@dataclass(frozen=True, slots=True)
class Chosen:
    """A row's token; log-probabilities of the raw distribution where asked for."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def choose(logits: Tensor, samplers: Sequence[RowSampler]) -> list[Chosen | None]:
    """``logits`` (B, V) fp32, one sampler a row. A row whose logits hold NaN or no finite value gives None."""
    if logits.shape[0] == 0:
        return []
    best = logits.argmax(-1).tolist()
    is_sound = (logits.isfinite().any(-1) & ~logits.isnan().any(-1)).tolist()
    chosen: list[Chosen | None] = []
    for row, sampler in enumerate(samplers):
        if not is_sound[row]:
            chosen.append(None)
            continue
        token = best[row] if sampler.settings.temperature == 0 else sampler.draw(logits[row])
        chosen.append(_with_logprobs(logits[row], token, sampler.settings.logprobs))
    return chosen


def _with_logprobs(logits: Tensor, token: int, wanted: int | None) -> Chosen:
    if wanted is None:
        return Chosen(token)
    logprobs = logits.log_softmax(-1)
    top: tuple[tuple[int, float], ...] = ()
    if wanted:
        values, indices = logprobs.topk(min(wanted, logprobs.shape[-1]))
        top = tuple(zip(indices.tolist(), values.tolist(), strict=True))
    return Chosen(token, float(logprobs[token]), top)
