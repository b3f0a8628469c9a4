"""The embedded engine against PEFT: each adapter loaded alone there, all of them in one mixed batch here."""

from __future__ import annotations

import asyncio

import pytest
import torch

from lora_runtime.combine import combine
from lora_runtime.engine.embedded.config import EmbeddedConfig
from lora_runtime.engine.embedded.engine import EmbeddedEngine
from lora_runtime.engine.protocol import ClassifyRequest
from tests.oracle.answers import COMBINATIONS, PROMPTS, Answers, oracle_answers, refs_of
from tests.oracle.asking import NUM_TOKENS, answer, check_mixed_batch, close
from tests.oracle.world import LABELS, World, build_world, chat, greedy, label_probabilities, picture


@pytest.fixture(scope="module")
def oracle(world: World) -> Answers:
    return oracle_answers(world)


def test_the_oracle_tells_adapters_apart(oracle):
    """Otherwise agreement would prove nothing: some answer of each target differs from the base's."""
    for target, answers in oracle.items():
        differences = [
            abs(a - b)
            for got, base in zip(answers, oracle[()], strict=True)
            for a, b in zip(got[1], base[1], strict=True)
        ]
        assert not target or max(differences) > 1e-3, target


@pytest.mark.parametrize("seed", [0, 1, 2])
async def test_one_mixed_batch_equals_peft_row_by_row(engine, world, oracle, seed):
    """Base, every family and six combinations, in shuffled order, with 21 adapters on 4 slots and 6 lanes."""
    refs = refs_of(world, oracle)
    await check_mixed_batch(engine, refs, PROMPTS, oracle, seed=seed, tolerance=1e-4)
    assert engine.stats().counters["slot_evictions"] > 0


async def test_requests_join_and_leave_in_the_middle(engine, world, oracle):
    """A long stream keeps its answer while others come, finish and are cancelled around it."""
    target = (("saved_merger", 1.0),)
    long = asyncio.create_task(answer(engine, PROMPTS[1], (world.ref("saved_merger"),), count=120))
    others = []
    for number, name in enumerate(["plain", "saved_head", "tower", "merger_lora"] * 3):
        other = asyncio.create_task(answer(engine, PROMPTS[1], (world.ref(name),), count=4 + number))
        await asyncio.sleep(0.01)
        if number % 3 == 2:
            other.cancel()
        others.append((name, other))
    tokens, logprobs = await long
    close((tokens[:NUM_TOKENS], logprobs[:NUM_TOKENS]), oracle[target][1], "the long stream")
    for name, other in others:
        try:
            tokens, logprobs = await other
        except asyncio.CancelledError:
            continue
        count = min(len(tokens), NUM_TOKENS)
        want = oracle[((name, 1.0),)][1]
        close((tokens[:count], logprobs[:count]), (want[0][:count], want[1][:count]), name)
    await asyncio.sleep(0.1)
    assert engine.stats().held_slots == 0


async def test_adapters_without_a_visual_part_share_one_encoding(engine, world):
    prompt = chat("Describe it", picture(77))
    for name in ("plain", "rslora", "saved_head"):
        await answer(engine, prompt, (world.ref(name),), count=1)
    await answer(engine, prompt, (), count=1)
    assert engine.stats().counters["image_encodings"] == 1
    await answer(engine, prompt, (world.ref("saved_merger"),), count=1)
    assert engine.stats().counters["image_encodings"] == 2


@pytest.mark.parametrize("share", [1.0, 0.5])
async def test_label_probabilities_equal_peft(engine, world, share):
    prompt = chat("Which animal?", picture(5))
    request = ClassifyRequest(request_id="c", prompt=prompt, adapters=(world.ref("classifier", share),))
    generating = [answer(engine, prompt, (world.ref(name),)) for name in ("plain", "saved_head")]
    got, *_ = await asyncio.gather(engine.classify(request), *generating)
    assert got.labels == LABELS
    if share == 1.0:
        want = label_probabilities(world.peft("classifier"), engine._prompts.prepare(prompt))
        assert max(abs(a - b) for a, b in zip(got.probabilities, want, strict=True)) < 1e-5
    assert abs(sum(got.probabilities) - 1) < 1e-6


@pytest.mark.parametrize("name", ["tokens", "saved_vocabulary", "saved_head", "vocabulary_lora"])
async def test_tied_bases_equal_peft(tied_world, name):
    engine = EmbeddedEngine(EmbeddedConfig(base_path=str(tied_world.base)))
    await engine.start()
    model = tied_world.peft(name)
    for prompt in PROMPTS[:2]:
        want = greedy(model, engine._prompts.prepare(prompt), NUM_TOKENS)
        close(await answer(engine, prompt, (tied_world.ref(name),)), want, name)
    base = greedy(tied_world.load(), engine._prompts.prepare(PROMPTS[0]), NUM_TOKENS)
    close(await answer(engine, PROMPTS[0]), base, "the base beside a resident adapter")
    await engine.close()


async def test_qwen2_5_vl_equals_peft(tmp_path):
    """A tower with windows: its rows are reordered inside each image, and gated MLPs."""
    world = build_world(tmp_path, qwen2_5=True)
    oracle = oracle_answers(world)
    engine = EmbeddedEngine(EmbeddedConfig(base_path=str(world.base), max_slots=6, max_batch_size=6, max_images=2))
    await engine.start()
    await check_mixed_batch(engine, refs_of(world, oracle), PROMPTS, oracle, seed=0, tolerance=1e-4)
    await engine.close()


def test_a_combination_compiled_to_one_adapter_equals_dense_arithmetic(world):
    base = world.load()
    parameters = dict(base.named_parameters())
    for shares in COMBINATIONS:
        members = [(world.read(name), share) for name, share in shares.items()]
        compiled = combine(members, lambda leaf, parameter: parameters[f"{leaf}.{parameter}"].detach())
        dense = dict(world.dense(shares).named_parameters())
        for leaf in compiled.modules:
            own = parameters[f"{leaf}.weight"].detach()
            got = own.clone()
            if leaf in compiled.saved and "weight" in compiled.saved[leaf].parameters:
                got = compiled.saved[leaf].parameters["weight"].clone()
            if leaf in compiled.lora:
                got += compiled.lora[leaf].delta().reshape(got.shape)
            if leaf in compiled.token_rows:
                rows = compiled.token_rows[leaf]
                got[rows.indices] += rows.rows - own[rows.indices]
            torch.testing.assert_close(got, dense[f"{leaf}.weight"], atol=1e-5, rtol=1e-5)
