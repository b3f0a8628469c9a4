"""Settings of the vLLM engine that make no sense are refused by name, before vLLM starts."""

from __future__ import annotations

import pytest

from lora_runtime.engine.vllm.config import VllmConfig


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"extra": {"enforce_eager": False}}, "enforce_eager"),
        ({"extra": {"enable_lora": False, "seed": 1}}, "enable_lora, seed"),
        ({"extra": {"pipeline_parallel_size": 2}}, "stages"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
        ({"tensor_parallel_size": 2, "compile": True}, "compile"),
        ({"max_slots": 0}, "max_slots"),
    ],
)
def test_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        VllmConfig(base_path="/base", **options)


def test_arguments_of_vllm_itself_pass() -> None:
    assert VllmConfig(base_path="/base", extra={"block_size": 32}).extra == {"block_size": 32}
