"""Every name of vLLM that Loom touches, and the versions in which it was checked. The only module that imports vLLM."""

from __future__ import annotations

import vllm
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs.engine import mm_input, tokens_input
from vllm.lora.layers import LoRAMappingType
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.conv import Conv3dLayer
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.multimodal.inputs import (
    MultiModalFieldConfig,
    MultiModalKwargsItems,
    PlaceholderRange,
)
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.utils.cpu_resource_utils import get_visible_memory_node
from vllm.utils.torch_utils import available_cpu_count
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.worker import lora_model_runner_mixin

from lora_runtime.errors import EngineFault

__all__ = [
    "AsyncEngineArgs",
    "AsyncLLM",
    "ColumnParallelLinear",
    "Conv3dLayer",
    "EngineDeadError",
    "LinearBase",
    "LoRAMappingType",
    "LoRARequest",
    "MultiModalFieldConfig",
    "MultiModalKwargsItems",
    "PlaceholderRange",
    "QKVParallelLinear",
    "RMSNorm",
    "RequestOutputKind",
    "RowParallelLinear",
    "SamplingParams",
    "UniProcExecutor",
    "VocabParallelEmbedding",
    "available_cpu_count",
    "check_version",
    "is_cpu",
    "lora_model_runner_mixin",
    "mm_input",
    "num_memory_nodes",
    "tokens_input",
]

SUPPORTED = ("0.32.", "0.33.")


def check_version(found: str | None = None) -> None:
    """Raise EngineFault for a vLLM whose internals were not checked. ``found`` is the installed one if None."""
    version = vllm.__version__ if found is None else found
    if not version.startswith(SUPPORTED):
        raise EngineFault(
            f"vLLM {version} is installed, but Loom's vLLM engine knows the internals of 0.32 and 0.33 only. "
            "Install one of those, or set engine.kind to 'embedded'."
        )


def is_cpu() -> bool:
    """Whether vLLM computes on a CPU here."""
    return bool(current_platform.is_cpu())


def num_memory_nodes() -> int:
    """NUMA nodes whose memory this process may use."""
    return len(get_visible_memory_node())
