"""The compiled language model: equal to PEFT in mixed batches, and each step takes the code that it needs."""

from __future__ import annotations

import asyncio
import shutil
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from lora_runtime.engine.routing import Router, Routing
from lora_runtime.errors import EngineFault
from lora_runtime.weights import LoraFactors, SavedModule
from tests.oracle.answers import PROMPTS, prepare, refs_of
from tests.oracle.asking import answer, check_mixed_batch, close
from tests.oracle.world import greedy
from tests.vllm.conftest import running

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here; `make test-vllm` installs it"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="compiling takes a C++ compiler, and g++ is not here"),
]


async def test_mixed_batches_equal_peft(world, oracle):
    refs = refs_of(world, oracle)
    alone = greedy(world.load(), prepare(world, PROMPTS[0]), 12)
    async with running(world, compile=True) as engine:
        close(await answer(engine, PROMPTS[0], count=12), alone, "the base alone", 1e-3)
        for seed in range(3):
            await check_mixed_batch(engine, refs, PROMPTS, oracle, seed=seed, tolerance=1e-3)
        # Steps of LoRA rows only, then of base rows only again.
        same = [answer(engine, PROMPTS[0], (world.ref("plain"),), count=12) for _ in range(3)]
        want = greedy(world.peft("plain"), prepare(world, PROMPTS[0]), 12)
        for got in await asyncio.gather(*same):
            close(got, want, "LoRA alone", 1e-3)
        close(await answer(engine, PROMPTS[0], count=12), alone, "the base alone, afterwards", 1e-3)


async def test_without_a_compiler_it_says_so(world, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(EngineFault, match=r"could not be compiled .* set compile to false"):
        async with running(world, compile=True):
            pytest.fail("it started")


class Method:
    def apply(self, module, x, bias=None):
        return nn.functional.linear(x, module.weight, bias)


class Decoder(nn.Module):
    """As vLLM's, in small: a linear and a norm that hands the sum on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.linear.quant_method = Method()
        self.norm = Norm()

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        x = self.linear.quant_method.apply(self.linear, inputs_embeds, self.linear.bias)
        y, total = self.norm(x, inputs_embeds)
        return y + total + positions.sum()


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))
        self.variance_epsilon = 1e-6

    def forward(self, x, residual=None):
        total = x if residual is None else x + residual
        y = nn.functional.rms_norm(total, (8,), self.weight, self.variance_epsilon)
        return y if residual is None else (y, total)


@torch.no_grad()
def test_each_step_takes_the_code_it_needs():
    from lora_runtime.engine.vllm.compiled import KINDS, CompiledDecoder
    from lora_runtime.engine.vllm.fusion import FusedLeaf, LeafParts
    from lora_runtime.engine.vllm.leaves import VllmLinear, VllmNorm, WrappedLeaf, _routed
    from lora_runtime.engine.vllm.sharding import WHOLE

    torch.manual_seed(0)
    decoder, router = Decoder(), Router()
    method = decoder.linear.quant_method
    linear = VllmLinear(decoder.linear, "text", router, method.apply, prepack=False, has_bias=True)
    norm = VllmNorm(decoder.norm, "text", router)
    fused = FusedLeaf(parts=("p",), widths=(8,), shards=(WHOLE,))
    leaves = {
        "linear": WrappedLeaf(linear, fused, method, "apply", lambda _, x, bias=None: _routed(linear, x)),
        "norm": WrappedLeaf(norm, fused, decoder.norm, "forward", norm.forward),
    }
    eager = decoder.forward
    compiled = CompiledDecoder(decoder, leaves, router)
    positions, x = torch.arange(3), torch.randn(3, 8)
    compiled.compile(lambda: compiled(None, positions, None, x))
    ran = dict.fromkeys(KINDS, 0)

    def counting(kind, code):
        def call(*arguments):
            ran[kind] += 1
            return code(*arguments)

        return call

    compiled._made = {kind: counting(kind, code) for kind, code in compiled._made.items()}
    lora = LoraFactors(a=torch.randn(2, 8), b=torch.randn(8, 2), scaling=1.0)
    leaves["linear"].fill(0, LeafParts(lora=lora, saved=None, rows=None, ranks=(2,)))
    saved = SavedModule(parameters={"weight": torch.randn(8)})
    leaves["norm"].fill(1, LeafParts(lora=None, saved=saved, rows=None, ranks=(0,)))
    steps = {
        "plain": [((), 5)],
        "acting": [((), 2), (((0, 0.5),), 4)],
    }
    for kind, signatures in [*steps.items(), ("acting", [(((1, 1.0),), 2), (((0, 1.0), (1, -0.5)), 1), ((), 1)])]:
        routing = Routing(signatures, device=torch.device("cpu"), dtype=torch.float32)
        router.set(text=routing)
        rows = torch.randn(routing.num_tokens, 8)
        before = dict(ran)
        got = compiled(None, torch.arange(routing.num_tokens), None, rows)
        assert {name for name in KINDS if ran[name] > before[name]} == {kind}
        want = eager(None, torch.arange(routing.num_tokens), None, rows)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, compiled._made["plain"](torch.arange(4), rows))
