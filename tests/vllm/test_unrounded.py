"""DoRA, LoHa and sums of them on a base stored in bf16, served by vLLM in fp32: nothing is rounded on the way."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from lora_runtime.doctor import ROUNDED
from tests.oracle.small_changes import CONFIGS, Shares, build_small_world, check_served
from tests.vllm.conftest import running

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here; `make test-vllm` installs it"),
]
NAMES = [name for name in CONFIGS if name.startswith(("dora", "loha"))]
TARGETS: tuple[Shares, ...] = (
    *({name: 1.0} for name in (*NAMES, "saved", "biases", "tokens")),
    {"dora": 8.0},
    {"loha": -1.0},
    {"dora": 0.5, "loha": 0.5},
    {"dora": 0.5, "saved": 0.5},
)


async def test_what_is_served_is_what_peft_answers_in_fp32(tmp_path: Path) -> None:
    small = build_small_world(tmp_path)
    async with running(small) as engine:
        await check_served(engine, small, TARGETS)
        codes = {finding.code for finding in (await engine.examine(str(small.adapters["dora"]))).findings}
        assert "rounded-away" not in codes, f"in fp32 less than {ROUNDED:.0%} is lost"
