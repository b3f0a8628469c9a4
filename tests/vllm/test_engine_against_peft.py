"""The vLLM engine against PEFT: each adapter loaded alone there, all of them in one mixed batch here."""

from __future__ import annotations

import asyncio
import random
import shutil
from importlib.util import find_spec

import pytest
from safetensors.torch import load_file, save_file

from lora_runtime.checkpoint import fingerprint
from lora_runtime.engine.protocol import AdapterRef, ClassifyRequest, GenerateRequest, Sampling
from lora_runtime.errors import AdapterRejected, InvalidCombination, NonFiniteWeights
from tests.oracle.answers import PROMPTS, oracle_answers, prepare, refs_of
from tests.oracle.asking import answer, check_coldness, check_long_prompts, check_mixed_batch, close
from tests.oracle.world import LABELS, build_world, chat, greedy, label_probabilities, picture
from tests.vllm.conftest import running

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here; `make test-vllm` installs it"),
]
TOLERANCE = 1e-3


@pytest.mark.parametrize("seed", [0, 1, 2])
async def test_one_mixed_batch_equals_peft_row_by_row(engine, world, oracle, seed):
    """Base, every family and six combinations, in shuffled order; from the second round the prefix cache is warm."""
    refs = refs_of(world, oracle)
    await check_mixed_batch(engine, refs, PROMPTS, oracle, seed=seed, tolerance=TOLERANCE)
    assert engine.stats().counters["slot_evictions"] > 0


async def test_prompts_that_cannot_fit_are_refused_before_they_are_tokenized(engine, world, monkeypatch):
    await check_long_prompts(engine, world.ref("classifier"), monkeypatch)


@pytest.mark.parametrize("share", [1.0, 0.5])
async def test_label_probabilities_equal_peft(engine, world, share):
    prompt = chat("Which animal?", picture(5))
    request = ClassifyRequest(request_id="c", prompt=prompt, adapters=(world.ref("classifier", share),))
    generating = [answer(engine, prompt, (world.ref(name),)) for name in ("plain", "saved_head")]
    got, *_ = await asyncio.gather(engine.classify(request), *generating)
    assert got.labels == LABELS
    assert abs(sum(got.probabilities) - 1) < 1e-5
    if share == 1.0:
        want = label_probabilities(world.peft("classifier"), prepare(world, prompt))
        assert max(abs(a - b) for a, b in zip(got.probabilities, want, strict=True)) < 1e-5


async def test_an_image_is_encoded_once_for_all_adapters_without_a_visual_part(engine, world):
    async def encoded() -> int:
        (count,) = await engine._engine.collective_rpc("loom_num_encoded")
        return count

    prompt = chat("Describe it", picture(77))
    before = await encoded()
    for name in ("plain", "rslora", "saved_head"):
        await answer(engine, prompt, (world.ref(name),), count=1)
    await answer(engine, prompt, (), count=1)
    assert await encoded() == before + 1
    await answer(engine, prompt, (world.ref("saved_merger"),), count=1)
    assert await encoded() == before + 2


async def test_usage_says_what_had_to_be_loaded(engine, world):
    names = ("plain", "rslora", "tower", "saved_head", "saved_merger")
    await check_coldness(engine, chat("hello"), [world.ref(name) for name in names])


async def test_scopes_share_nothing_that_is_kept(engine, world):
    from lora_runtime.engine.vllm.translate import engine_input

    async def ask(scope: str) -> int:
        """Encodings made for one request."""
        (before,) = await engine._engine.collective_rpc("loom_num_encoded")
        request = GenerateRequest(
            request_id="s",
            prompt=chat("Describe it", picture(78)),
            sampling=Sampling(max_tokens=1, temperature=0.0),
            cache_scope=scope,
        )
        async for _ in engine.generate(request):
            pass
        (after,) = await engine._engine.collective_rpc("loom_num_encoded")
        return after - before

    assert [await ask(scope) for scope in ("", "", "one", "one", "two", "")] == [1, 0, 1, 0, 1, 0]
    prepared = prepare(world, chat("Describe it")).scoped("one")
    assert engine_input(prepared, engine._images, ())["cache_salt"] == "one"
    assert "cache_salt" not in engine_input(prepare(world, chat("Describe it")), engine._images, ())


async def test_preempted_requests_go_on_rightly(world, oracle):
    """12 blocks of 32 tokens: four prompts of 72 tokens fit, but two answers of 60, so some are computed anew."""
    targets = ["plain", "saved_merger", "saved_head", "saved_norms", "tower"]
    prompt = prepare(world, PROMPTS[1])
    wanted = {name: greedy(world.peft(name), prompt, 60) for name in targets}
    wanted["base"] = greedy(world.load(), prompt, 60)
    cache = {"block_size": 32, "num_gpu_blocks_override": 12}
    async with running(world, max_model_len=256, extra=cache, max_slots=5) as small:
        for _ in range(2):
            asked = [(world.ref(name),) if name != "base" else () for name in wanted]
            answers = await asyncio.gather(*(answer(small, PROMPTS[1], refs, count=60) for refs in asked))
            for name, got in zip(wanted, answers, strict=True):
                close(got, wanted[name], name, TOLERANCE)


async def test_saved_modules_take_turns_in_the_memory_there_is(world):
    """Room for the larger of two and not for both; each has its turn, one by one and at once, and both together are
    refused, as is one that could never fit."""
    names = ("saved_vocabulary", "saved_head", "saved_block", "plain")
    wanted = {name: greedy(world.peft(name), prepare(world, PROMPTS[0]), 4) for name in names}
    sizes = {name: 4 * sum(t.numel() for m in world.read(name).saved.values() for t in m.parameters.values())
             for name in names}  # fmt: skip
    assert sizes["saved_vocabulary"] > sizes["saved_head"] > 0
    budget = sizes["saved_vocabulary"] + sizes["saved_head"] // 2
    async with running(world, saved_bytes=budget, max_slots=8) as small:
        order = random.Random(0).choices(names, k=12)
        for name in order:
            close(await answer(small, PROMPTS[0], (world.ref(name),), count=4), wanted[name], name, TOLERANCE)
        answers = await asyncio.gather(*(answer(small, PROMPTS[0], (world.ref(name),), count=4) for name in order))
        for name, got in zip(order, answers, strict=True):
            close(got, wanted[name], name, TOLERANCE)
        with pytest.raises(InvalidCombination, match="saved_bytes"):
            await answer(small, PROMPTS[0], (world.ref("saved_vocabulary"), world.ref("saved_head", 0.5)))
        assert small.stats().held_slots == 0
    async with running(world, saved_bytes=sizes["saved_vocabulary"] * 3 // 4) as poor:  # tables are padded there
        with pytest.raises(AdapterRejected, match="saved_bytes"):
            await answer(poor, PROMPTS[0], (world.ref("saved_vocabulary"),))
        got = await answer(poor, PROMPTS[0], (world.ref("saved_head"),), count=4)
        close(got, wanted["saved_head"], "saved_head", TOLERANCE)
        assert poor.stats().held_slots == 0


async def test_what_is_wrong_with_an_adapter_is_said_in_its_own_kind(world, tmp_path):
    """Weights are read in vLLM's process, and the error comes from there."""
    spoilt = shutil.copytree(world.ref("saved_head").path, tmp_path / "spoilt")
    tensors = load_file(spoilt / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, spoilt / "adapter_model.safetensors")
    ref = AdapterRef(version=fingerprint(spoilt), path=str(spoilt), name="spoilt")
    async with running(world) as engine:
        with pytest.raises(NonFiniteWeights, match="NaN or infinity in 1 tensors") as caught:
            await answer(engine, PROMPTS[0], (ref,))
        assert len(caught.value.facts["tensors"]) == 1
        assert (await answer(engine, PROMPTS[0], (world.ref("saved_head"),)))[0]


async def test_tied_bases_equal_peft(tmp_path):
    """The head is the embedding's own module there, and adapters change one, the other or both."""
    tied = build_world(tmp_path, tie=True)
    async with running(tied) as engine:
        for name in ("tokens", "saved_vocabulary", "saved_head", "vocabulary_lora"):
            model = tied.peft(name)
            for prompt in PROMPTS[:2]:
                want = greedy(model, prepare(tied, prompt), 8)
                close(await answer(engine, prompt, (tied.ref(name),)), want, name, TOLERANCE)
            base = greedy(tied.load(), prepare(tied, PROMPTS[0]), 8)
            close(await answer(engine, PROMPTS[0]), base, f"the base beside {name}", TOLERANCE)


async def test_qwen2_5_vl_equals_peft(tmp_path):
    """A tower with windows: its rows are reordered inside each image; q, k and v packed in one, gated MLPs fused."""
    world = build_world(tmp_path, qwen2_5=True)
    oracle = oracle_answers(world)
    async with running(world) as engine:
        for seed in range(2):
            await check_mixed_batch(engine, refs_of(world, oracle), PROMPTS, oracle, seed=seed, tolerance=TOLERANCE)
