"""What an engine does besides being right: refuses, cancels, keeps deadlines, rests, and loses nothing."""

from __future__ import annotations

import asyncio
import shutil
import time
from contextlib import aclosing
from dataclasses import replace

import pytest

from lora_runtime.engine.embedded.config import EmbeddedConfig
from lora_runtime.engine.embedded.engine import EmbeddedEngine
from lora_runtime.engine.protocol import (
    AdapterRef,
    ChatPrompt,
    ClassifyRequest,
    GenerateRequest,
    ImagePart,
    Message,
    Prompt,
    Sampling,
    TextPrompt,
    TokenPrompt,
)
from lora_runtime.errors import (
    AdapterMissing,
    AdapterRejected,
    ContextOverflow,
    DeadlineExceeded,
    EngineFault,
    InvalidCombination,
    InvalidImage,
    InvalidRequest,
    LoomError,
    NotFound,
    Overloaded,
)
from tests.oracle.asking import check_coldness, check_long_prompts
from tests.oracle.world import World, chat, picture

HELLO = chat("hello")


def request(prompt: Prompt = HELLO, adapters: tuple[AdapterRef, ...] = (), timeout_s: float | None = None, **sampling):
    settings = Sampling(**{"temperature": 0.0, "max_tokens": 4, "ignore_eos": True, **sampling})
    return GenerateRequest(request_id="test", prompt=prompt, adapters=adapters, sampling=settings, timeout_s=timeout_s)


async def run(engine: EmbeddedEngine, asked: GenerateRequest) -> list:
    return [event async for event in engine.generate(asked)]


async def settled(engine: EmbeddedEngine) -> None:
    """Wait until nothing runs; then nothing may be held."""
    for _ in range(100):
        stats = engine.stats()
        if (stats.running, stats.waiting, stats.held_slots) == (0, 0, 0):
            break
        await asyncio.sleep(0.02)
    assert (stats.running, stats.waiting, stats.held_slots, stats.kv_used_tokens) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        (chat("x", b"not an image"), InvalidImage),
        (chat("x", picture(1)[:100]), InvalidImage),
        (chat("x", *[picture(1)] * 17), InvalidRequest),
        (chat("red " * 3000), ContextOverflow),
        (TextPrompt(text=""), InvalidRequest),
        (TokenPrompt(token_ids=(10**9,)), InvalidRequest),
        (TokenPrompt(token_ids=(-1,)), InvalidRequest),
    ],
)
async def test_bad_prompts_are_refused_and_the_engine_goes_on(engine, prompt, error):
    with pytest.raises(error):
        await run(engine, request(prompt))
    assert len(await run(engine, request())) == 4


async def test_prompts_that_cannot_fit_are_refused_before_they_are_tokenized(engine, world: World, monkeypatch):
    await check_long_prompts(engine, world.ref("classifier"), monkeypatch)
    await settled(engine)


async def test_bad_adapters_fail_their_own_requests_only(engine, world: World, tmp_path):
    good, others = world.ref("plain"), asyncio.gather(*(run(engine, request(max_tokens=30)) for _ in range(3)))
    with pytest.raises(AdapterMissing):
        await run(engine, request(adapters=(replace(good, version="0" * 64, path=str(tmp_path / "none")),)))
    with pytest.raises(AdapterRejected, match="changed on disk"):
        await run(engine, request(adapters=(replace(good, version="0" * 64),)))
    shutil.copytree(world.adapters["plain"], tmp_path / "cut")
    tensors = tmp_path / "cut" / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    with pytest.raises(AdapterRejected):
        await engine.examine(str(tmp_path / "cut"))
    assert all(len(events) == 30 for events in await others)
    await settled(engine)


async def test_more_adapters_than_slots_in_one_request_are_refused(engine, world):
    names = ["plain", "rslora", "patterns", "tower", "tokens"]
    with pytest.raises(InvalidCombination, match="5 adapters"):
        await run(engine, request(adapters=tuple(world.ref(name) for name in names)))


async def test_closing_a_stream_frees_everything(engine, world):
    async with aclosing(engine.generate(request(adapters=(world.ref("plain"),), max_tokens=500))) as events:
        async for _ in events:
            break
    await settled(engine)
    assert engine.stats().counters["cancelled"] == 1


async def test_a_deadline_ends_a_request_that_runs(engine):
    with pytest.raises(DeadlineExceeded):
        await run(engine, request(max_tokens=1500, timeout_s=0.2))
    await settled(engine)


async def test_a_full_engine_says_so(world):
    engine = EmbeddedEngine(EmbeddedConfig(base_path=str(world.base), max_batch_size=1, max_waiting=2))
    await engine.start()
    results = await asyncio.gather(*(run(engine, request(max_tokens=20)) for _ in range(8)), return_exceptions=True)
    refused = [result for result in results if isinstance(result, Overloaded)]
    assert len(refused) == 5
    assert all(error.facts["retry_after_s"] >= 1 for error in refused)
    assert sum(isinstance(result, list) for result in results) == 3
    await engine.close()


async def test_choices_differ_and_repeat_by_seed(engine):
    asked = request(n=3, temperature=1.0, seed=5, max_tokens=6)

    def by_choice(events) -> dict[int, list[int]]:
        tokens: dict[int, list[int]] = {}
        for event in events:
            tokens.setdefault(event.choice, []).extend(token.token_id for token in event.tokens)
        return tokens

    first = by_choice(await run(engine, asked))
    crowd = await asyncio.gather(run(engine, asked), *(run(engine, request(max_tokens=9)) for _ in range(4)))
    assert first == by_choice(crowd[0])
    assert len({tuple(tokens) for tokens in first.values()}) == 3
    assert sum(event.usage is not None for event in crowd[0]) == 1
    assert crowd[0][-1].usage.completion_tokens == 18


async def test_heads_are_looked_for(engine, world):
    for adapters in ((), (world.ref("plain"),)):
        with pytest.raises(NotFound):
            await engine.classify(ClassifyRequest(request_id="c", prompt=HELLO, adapters=adapters))
    with pytest.raises(NotFound, match="other"):
        await engine.classify(
            ClassifyRequest(request_id="c", prompt=HELLO, adapters=(world.ref("classifier"),), head="other")
        )


async def test_an_adapter_that_waits_for_a_slot_is_not_starved(world):
    """One slot, held by a stream of one adapter's requests: the other adapter's turn comes all the same."""
    engine = EmbeddedEngine(EmbeddedConfig(base_path=str(world.base), max_batch_size=4, max_slots=1))
    await engine.start()
    stop = asyncio.Event()

    async def hog() -> None:
        while not stop.is_set():
            await run(engine, request(adapters=(world.ref("plain"),), max_tokens=20))

    hogs = [asyncio.create_task(hog()) for _ in range(3)]
    await asyncio.sleep(0.2)
    async with asyncio.timeout(10):
        assert len(await run(engine, request(adapters=(world.ref("tower"),)))) == 4
    stop.set()
    await asyncio.gather(*hogs)
    await settled(engine)
    await engine.close()


async def test_a_pinned_adapter_stays_until_it_is_unpinned(world):
    engine = EmbeddedEngine(EmbeddedConfig(base_path=str(world.base), max_slots=2))
    await engine.start()
    kept = world.ref("plain")
    await engine.pin(kept)
    for name in ("tower", "rslora", "saved_head"):
        await run(engine, request(adapters=(world.ref(name),)))
        assert kept.version in engine.stats().resident
    with pytest.raises(InvalidCombination, match="at most 1"):
        await run(engine, request(adapters=(world.ref("tower"), world.ref("rslora"))))
    await engine.pin(world.ref("tower"))
    with pytest.raises(Overloaded):
        await engine.pin(world.ref("rslora"))
    with pytest.raises(AdapterMissing):
        await engine.pin(AdapterRef(version="x", path="/nowhere", name="nowhere", weight=1.0))
    await engine.unpin(kept.version)
    await run(engine, request(adapters=(world.ref("rslora"),)))
    assert kept.version not in engine.stats().resident
    await engine.close()
    with pytest.raises(EngineFault):
        await engine.pin(kept)


async def test_usage_says_what_had_to_be_loaded(world):
    engine = EmbeddedEngine(EmbeddedConfig(base_path=str(world.base), max_slots=2))
    await engine.start()
    await check_coldness(engine, HELLO, [world.ref(name) for name in ("plain", "tower", "rslora")])
    await engine.close()


async def test_an_idle_engine_rests(engine):
    await run(engine, request())
    before = time.process_time()
    await asyncio.sleep(1.0)
    assert time.process_time() - before < 0.05


async def test_closing_ends_what_runs(world):
    engine = EmbeddedEngine(EmbeddedConfig(base_path=str(world.base)))
    await engine.start()
    running = asyncio.create_task(run(engine, request(max_tokens=1500)))
    await asyncio.sleep(0.2)
    await engine.close()
    with pytest.raises(EngineFault):
        await running
    with pytest.raises(LoomError):
        await run(engine, request())


async def test_a_request_cannot_smuggle_special_tokens(engine):
    text = "<|im_end|><|image_pad|><|vision_start|>"
    prepared = engine._prompts.prepare(chat(text))
    plain = engine._prompts.prepare(chat("x"))
    specials = set(engine._prompts.tokenizer.all_special_ids)
    count = lambda ids: sum(token in specials for token in ids)  # noqa: E731
    assert count(prepared.ids) == count(plain.ids)
    assert text in engine._prompts.tokenizer.decode(prepared.ids)


async def test_an_image_in_any_place_of_any_message(engine):
    messages = (
        Message(role="system", parts=HELLO.messages[0].parts),
        Message(role="user", parts=(*HELLO.messages[0].parts, ImagePart(data=picture(1)), *HELLO.messages[0].parts)),
        Message(role="assistant", parts=HELLO.messages[0].parts),
        Message(role="user", parts=(ImagePart(data=picture(2)), ImagePart(data=picture(3)))),
    )
    assert len(engine._prompts.prepare(ChatPrompt(messages=messages)).images) == 3
    assert len(await run(engine, request(ChatPrompt(messages=messages)))) == 4
