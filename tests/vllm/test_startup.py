"""With what vLLM is started, and where its worker lives."""

from __future__ import annotations

import os
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

from lora_runtime.engine.vllm.config import VllmConfig

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here; `make test-vllm` installs it"),
]


def test_where_the_worker_lives():
    from lora_runtime.engine.vllm.startup import computes_inline

    def inline(environment=(), *, is_cpu=True, num_nodes=1, **options):
        config = VllmConfig(base_path="/base", **options)
        return computes_inline(config, is_cpu=is_cpu, num_nodes=num_nodes, environment=dict(environment))

    assert inline()
    assert inline({"VLLM_CPU_OMP_THREADS_BIND": "auto"})
    assert not inline({"VLLM_CPU_OMP_THREADS_BIND": "0-3"})
    assert not inline(is_cpu=False)
    assert not inline(num_nodes=2)
    assert not inline(tensor_parallel_size=2)
    assert not inline(extra={"distributed_executor_backend": "mp"})


def test_starting_leaves_the_environment_as_it_was(monkeypatch, world):
    from lora_runtime.engine.vllm import startup

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv(startup.RUNNER, "0")
    seen = {}
    engine = SimpleNamespace(from_engine_args=lambda arguments: seen.update(os.environ))
    monkeypatch.setattr(startup.names, "AsyncLLM", engine)
    before = dict(os.environ)
    startup.start(VllmConfig(base_path=str(world.base), num_threads=3, kv_cache_bytes=5 << 29))
    assert (seen["OMP_NUM_THREADS"], seen["VLLM_CPU_KVCACHE_SPACE"]) == ("3", "3")
    assert dict(os.environ) == before


def test_the_runner_that_was_tested_is_asked_for(monkeypatch, world):
    from lora_runtime.engine.vllm import startup

    monkeypatch.setattr(startup.names, "AsyncLLM", SimpleNamespace(from_engine_args=lambda arguments: None))
    monkeypatch.setenv(startup.RUNNER, "1")
    startup.start(VllmConfig(base_path=str(world.base)))
    assert os.environ[startup.RUNNER] == "1", "who sets it has it"
    monkeypatch.delenv(startup.RUNNER)
    startup.start(VllmConfig(base_path=str(world.base)))
    assert os.environ[startup.RUNNER] == "0"
