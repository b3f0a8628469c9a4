"""Two workers that share every leaf, as two GPUs would: real processes, exchanging results on the CPU."""

from __future__ import annotations

import asyncio
import os
import random
from importlib.util import find_spec

import pytest

from lora_runtime.engine.protocol import ClassifyRequest
from tests.oracle.answers import PROMPTS, prepare
from tests.oracle.asking import answer, close
from tests.oracle.world import LABELS, chat, label_probabilities, picture
from tests.vllm.conftest import running

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here; `make test-vllm` installs it"),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each worker needs a core"),
]


async def test_two_workers_equal_peft_row_by_row(world, oracle, monkeypatch):
    """Every family and combination, mixed, adapters coming and going; a head; and a bad adapter in between."""
    first, second, *_ = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{first}|{second}")
    work = [(target, number) for target in oracle for number in range(len(PROMPTS))]
    random.Random(0).shuffle(work)
    async with running(world, tensor_parallel_size=2) as engine:

        async def ask(target, number):
            return await answer(engine, PROMPTS[number], tuple(world.ref(name, weight) for name, weight in target))

        answers = await asyncio.gather(*(ask(target, number) for target, number in work))
        for (target, number), got in zip(work, answers, strict=True):
            close(got, oracle[target][number], f"{target} on prompt {number}", 1e-3)
        prompt = chat("Which animal?", picture(5))
        request = ClassifyRequest(request_id="c", prompt=prompt, adapters=(world.ref("classifier"),))
        found = await engine.classify(request)
        assert found.labels == LABELS
        want = label_probabilities(world.peft("classifier"), prepare(world, prompt))
        assert max(abs(a - b) for a, b in zip(found.probabilities, want, strict=True)) < 1e-5
        assert engine.stats().held_slots == 0
