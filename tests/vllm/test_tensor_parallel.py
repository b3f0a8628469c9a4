"""Two workers that share every leaf, as two GPUs would: real processes, exchanging results on the CPU."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

from lora_runtime.engine.protocol import ClassifyRequest
from tests.oracle.answers import PROMPTS, prepare
from tests.oracle.asking import check_mixed_batch
from tests.oracle.world import LABELS, chat, label_probabilities, picture
from tests.vllm.conftest import running

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here; `make test-vllm` installs it"),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each worker needs a core"),
]


async def test_two_workers_equal_peft_row_by_row(world, oracle, monkeypatch):
    """Every family and combination, mixed, adapters coming and going; and a head."""
    first, second, *_ = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{first}|{second}")
    async with running(world, tensor_parallel_size=2) as engine:
        refs = {target: tuple(world.ref(name, weight) for name, weight in target) for target in oracle}
        await check_mixed_batch(engine, refs, PROMPTS, oracle, seed=0, tolerance=1e-3)
        prompt = chat("Which animal?", picture(5))
        request = ClassifyRequest(request_id="c", prompt=prompt, adapters=(world.ref("classifier"),))
        found = await engine.classify(request)
        assert found.labels == LABELS
        want = label_probabilities(world.peft("classifier"), prepare(world, prompt))
        assert max(abs(a - b) for a, b in zip(found.probabilities, want, strict=True)) < 1e-5
