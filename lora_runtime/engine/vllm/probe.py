"""What an engine proves before it serves, through vLLM's own batching: rows get their target, base rows none.

:mod:`.contract` proves each leaf; here requests go in by the front door. The probe adapter makes every answer
known beforehand without a second model: its final norm is zero, so that the hidden state is, and a bias on
``lm_head`` alone decides the logits. One base request alone, then a batch of base, probe and base.
"""

from __future__ import annotations

import asyncio
import math
from typing import Any

import torch

from lora_runtime.engine.vllm import names
from lora_runtime.engine.vllm.binding import Binding
from lora_runtime.errors import EngineFault
from lora_runtime.layout import BaseLayout
from lora_runtime.weights import AdapterWeights, LoraFactors, SavedModule

PROMPT = [1, 2, 3, 4]
FINAL_NORM = "model.language_model.norm"
PEAK = 12.0
TOKEN = 5
"""The token whose logit the probe sets to ``PEAK``; all others get 0."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.05}
"""In log-probability. Batches of another size round otherwise."""


def probe_weights(layout: BaseLayout) -> AdapterWeights:
    """The adapter whose answer is known."""
    hidden, vocabulary = layout.hidden_size, layout.leaves["lm_head"].out_features
    bias = torch.zeros(vocabulary)
    bias[TOKEN] = PEAK
    head = LoraFactors(a=torch.zeros(1, hidden), b=torch.zeros(vocabulary, 1), scaling=1.0, bias=bias)
    norm = SavedModule(parameters={"weight": torch.zeros(hidden)})
    return AdapterWeights(version="probe", lora={"lm_head": head}, saved={FINAL_NORM: norm})


async def prove(engine: Any, layout: BaseLayout, slot: int) -> None:
    """Raises EngineFault saying which row got another answer than its own. ``slot`` must be free, and is after."""
    dtype = str(engine.vllm_config.model_config.dtype).removeprefix("torch.")
    target = names.LoRARequest("probe", 1, Binding(signature=((slot, 1.0),)).to_path())
    base = await _log_probability(engine, "probe-alone", None)
    known = PEAK - math.log(math.exp(PEAK) + layout.vocab_size - 1)
    await engine.collective_rpc("loom_fill_probe", args=(slot,))
    try:
        got = await asyncio.gather(
            *(_log_probability(engine, f"probe-{n}", lora) for n, lora in enumerate([None, target, None]))
        )
    finally:
        await engine.collective_rpc("loom_clear", args=(slot,))
    for row, (found, want) in enumerate(zip(got, [base, known, base], strict=True)):
        if not abs(found - want) < TOLERANCE[dtype]:
            what = "The adapter's row" if row == 1 else "A base row"
            raise EngineFault(
                f"{what} of a mixed batch got log-probability {found:.4f} from vLLM, where {want:.4f} is right. This "
                "vLLM must not serve; use a supported version.",
                found=found,
                wanted=want,
            )


async def _log_probability(engine: Any, name: str, lora: Any) -> float:
    """Of the likeliest token after the prompt."""
    parameters = names.SamplingParams(max_tokens=1, temperature=0.0, logprobs=0, ignore_eos=True)
    found = math.nan
    async for output in engine.generate(names.tokens_input(PROMPT), parameters, name, lora_request=lora):
        for scores in output.outputs[0].logprobs or ():
            found = max(score.logprob for score in scores.values())
    return found
