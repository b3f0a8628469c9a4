"""With what vLLM is started: its arguments, and where it computes on a CPU.

On CPUs vLLM gives its one worker a process of its own, since OpenMP's threads are settled before a process starts,
and keeps a core for the engine's process, which spins while it waits for the worker. Here the engine's process is
started with OpenMP's threads settled, so the worker lives in it and has every core: a step on two cores takes three
quarters of the time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lora_runtime.engine import threads
from lora_runtime.engine.vllm import names
from lora_runtime.engine.vllm.config import VllmConfig
from lora_runtime.errors import EngineFault

OMP_THREADS = "OMP_NUM_THREADS"
OMP_BINDING = "VLLM_CPU_OMP_THREADS_BIND"
"""vLLM's own setting of who computes where; whoever sets it gets vLLM's way."""

RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
"""vLLM's choice between its two; whoever sets it has it."""


def start(config: VllmConfig) -> Any:
    """vLLM's engine, once it is ready for requests. Blocks for seconds. Raises EngineFault for what it cannot do."""
    from lora_runtime.engine.vllm.plugin import register

    is_cpu = names.is_cpu()
    if config.compile and not is_cpu:
        raise EngineFault("compile is for CPUs; on a GPU set it to false.")
    register()
    # The runner that was tested; for GPUs vLLM has a second one by now. Not undone: this process asks for it with each
    # request.
    os.environ.setdefault(RUNNER, "0")
    num_nodes = names.num_memory_nodes() if is_cpu else 0
    is_inline = computes_inline(config, is_cpu=is_cpu, num_nodes=num_nodes, environment=os.environ)
    with _environment(config, is_inline=is_inline):
        return names.AsyncLLM.from_engine_args(arguments(config, is_inline=is_inline))


def computes_inline(config: VllmConfig, *, is_cpu: bool, num_nodes: int, environment: Mapping[str, str]) -> bool:
    """Whether the worker lives in the engine's process though vLLM would part them.

    Only on a CPU with one worker and one node of memory; with more of them vLLM keeps threads by their memory.
    """
    if not is_cpu or config.tensor_parallel_size > 1 or "distributed_executor_backend" in config.extra:
        return False
    return environment.get(OMP_BINDING, "auto") == "auto" and num_nodes == 1


def arguments(config: VllmConfig, *, is_inline: bool) -> Any:
    """The arguments of vLLM's engine."""
    own: dict[str, Any] = {"distributed_executor_backend": names.UniProcExecutor} if is_inline else {}
    return names.AsyncEngineArgs(
        model=config.base_path,
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_batch_size,
        max_num_batched_tokens=config.max_batched_tokens,
        gpu_memory_utilization=config.gpu_memory_utilization,
        enable_prefix_caching=config.prefix_caching,
        tensor_parallel_size=config.tensor_parallel_size,
        seed=config.seed,
        # vLLM's own limit of adapters a batch: here an id is a target, and needs no memory.
        enable_lora=True,
        max_loras=config.max_batch_size,
        max_lora_rank=8,
        # Slots change between steps, so no step may be under way while another is prepared.
        async_scheduling=False,
        # A graph would freeze which rows a saved module acts on; what may be compiled is in .compiled.
        enforce_eager=True,
        max_logprobs=-1,
        limit_mm_per_prompt={"image": config.max_images, "video": 0},
        mm_processor_cache_gb=0,
        # Patches come normalised, from the same preprocessing as the embedded engine's.
        mm_device_do_normalize=False,
        worker_extension_cls="lora_runtime.engine.vllm.worker.SlotWorker",
        additional_config={"loom": _own_config(config)},
        disable_log_stats=True,
        **own,
        **config.extra,
    )


def _own_config(config: VllmConfig) -> dict[str, Any]:
    """What Loom's part of a worker is told."""
    return {"base_path": config.base_path, "saved_bytes": config.saved_bytes, "compile": config.compile}


@contextmanager
def _environment(config: VllmConfig, *, is_inline: bool) -> Iterator[None]:
    """What vLLM's processes find in their environment; this process's own is as it was afterwards."""
    wanted = {"VLLM_NO_USAGE_STATS": "1", **os.environ}
    wanted.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, math.ceil(config.kv_cache_bytes / 2**30))))
    if is_inline:
        own = wanted.get(OMP_THREADS) or min(threads.available(), names.available_cpu_count())
        wanted[OMP_THREADS] = str(config.num_threads or own)
    changed = {name: os.environ.get(name) for name, value in wanted.items() if os.environ.get(name) != value}
    os.environ.update({name: wanted[name] for name in changed})
    try:
        yield
    finally:
        for name, value in changed.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
