"""Asking an engine greedily, and comparing with an oracle's answer."""

from __future__ import annotations

from lora_runtime.engine.protocol import AdapterRef, Engine, GenerateRequest, Prompt, Sampling

NUM_TOKENS = 8
Answer = tuple[list[int], list[float]]
"""Token ids and their log-probabilities."""


def close(got: Answer, want: Answer, what: str, tolerance: float = 1e-4) -> None:
    """Equal tokens, log-probabilities within ``tolerance``."""
    assert got[0] == want[0], what
    assert max(abs(a - b) for a, b in zip(got[1], want[1], strict=True)) < tolerance, what


async def answer(
    engine: Engine, prompt: Prompt, adapters: tuple[AdapterRef, ...] = (), count: int = NUM_TOKENS
) -> Answer:
    """Greedy tokens and their log-probabilities."""
    sampling = Sampling(temperature=0.0, max_tokens=count, logprobs=0, ignore_eos=True)
    request = GenerateRequest(request_id="test", prompt=prompt, adapters=adapters, sampling=sampling)
    tokens, logprobs = [], []
    async for event in engine.generate(request):
        tokens += [token.token_id for token in event.tokens]
        logprobs += [token.logprob for token in event.tokens]
    return tokens, logprobs
