"""Examples put to live engines with weighted adapters: a trial is a batch of requests, and nothing is built for it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace

from lora_runtime.engine.protocol import AdapterRef, Engine, GenerateRequest, Sampling, TokenEvent
from lora_runtime.errors import NotFound
from lora_runtime.merge.examples import Example
from lora_runtime.merge.search import Evaluate, Weights

Generate = Callable[[GenerateRequest], AsyncIterator[list[TokenEvent]]]
"""An engine client's: events in lists, as they became available together."""


def engine_evaluator(
    generate: Generate, refs: Mapping[str, AdapterRef], *, max_tokens: int, at_once: int, timeout_s: float = 300.0
) -> Evaluate:
    """Scores examples, each by its own metric, by greedy answers of the combination of ``refs`` with the weights asked
    for; the refs' own weights do not matter.

    At most ``at_once`` requests are under way, over all calls together. The first error ends a call, cancels its other
    requests and passes through as it is; nothing is tried twice. Weights of 0 are left out. Raises NotFound for a name
    without a ref.
    """
    room = asyncio.Semaphore(at_once)
    sampling = Sampling(max_tokens=max_tokens, temperature=0.0)

    async def score(example: Example, adapters: tuple[AdapterRef, ...]) -> float:
        request = GenerateRequest(
            request_id=f"search-{uuid.uuid4().hex}",
            prompt=example.prompt,
            adapters=adapters,
            sampling=sampling,
            timeout_s=timeout_s,
        )
        async with room:
            said = [event.text async for events in generate(request) for event in events]
        return example.score("".join(said))

    async def evaluate(weights: Weights, examples: Sequence[Example]) -> list[float]:
        if missing := sorted(set(weights) - set(refs)):
            raise NotFound(f"There is no adapter '{missing[0]}' to search over.", near=sorted(refs))
        adapters = tuple(replace(refs[name], weight=weight) for name, weight in weights.items() if weight)
        asked = [asyncio.ensure_future(score(example, adapters)) for example in examples]
        try:
            return list(await asyncio.gather(*asked))
        finally:
            for request in asked:
                request.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    return evaluate


def batched(engine: Engine) -> Generate:
    """``engine``'s own stream of single events, as an engine client would give it."""

    async def generate(request: GenerateRequest) -> AsyncIterator[list[TokenEvent]]:
        async for event in engine.generate(request):
            yield [event]

    return generate
