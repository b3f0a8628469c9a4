"""An engine as a deployment holds it, without Ray: whose requests it takes next."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from lora_runtime.engine.protocol import AdapterRef, ClassifyRequest, GenerateRequest, Sampling, TextPrompt, TokenPrompt
from lora_runtime.errors import ContextOverflow, DeadlineExceeded, Overloaded, TurnTimeout
from serve.config import Settings
from serve.fairness import FairQueue
from serve.replica import EngineReplica
from tests.fakes import write_fake_adapter


class Replica(EngineReplica):
    """Closed by whoever made it, rather than by Ray."""

    def __del__(self) -> None:  # type: ignore[override]
        return


@pytest.fixture
async def replica(tmp_path: Path) -> AsyncIterator[EngineReplica]:
    options = {"kind": "fake", "options": {"token_s": 0.001}}
    settings = Settings.model_validate({"engine": options, "state_dir": str(tmp_path)})
    made = Replica(settings.model_dump(mode="json"))
    await made.check_health()
    made._turns = FairQueue(1, 64)
    yield made
    await EngineReplica.__del__(made)


def request(number: int, caller: str, folder: Path, names: tuple[str, ...], **more: object) -> GenerateRequest:
    refs = tuple(AdapterRef(version=name * 64, path=str(folder / name), name=name) for name in names)
    return GenerateRequest(
        request_id=f"{caller}{number}",
        prompt=TextPrompt(text="hi"),
        adapters=refs,
        sampling=Sampling(max_tokens=2),
        caller=caller,
        **more,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("callers", [("greedy", "honest"), ("", "")])
async def test_combinations_and_keys_do_not_multiply_ones_turns(
    replica: EngineReplica, tmp_path: Path, callers: tuple[str, str]
):
    """64 requests over all combinations of four adapters are there first."""
    done: list[str] = []

    async def ask(who: str, asked: GenerateRequest) -> None:
        try:
            async for _ in replica.generate(asked):
                pass
            done.append(who)
        except Overloaded:
            done.append(f"{who}, refused")

    combinations = [names for size in range(1, 5) for names in itertools.combinations("abcd", size)]
    greedy, honest = callers
    asked = itertools.islice(itertools.cycle(combinations), 65)
    tasks = [asyncio.create_task(ask("greedy", request(n, greedy, tmp_path, s))) for n, s in enumerate(asked)]
    await asyncio.sleep(0)
    tasks += [asyncio.create_task(ask("honest", request(n, honest, tmp_path, ("h",)))) for n in range(5)]
    await asyncio.gather(*tasks)
    answered = [who for who in done if not who.endswith("refused")]
    assert done.count("honest") == 5 and done.count("honest, refused") == 0
    turns_each = 2 if greedy else 5
    last = len(answered) - 1 - answered[::-1].index("honest")
    assert last <= 5 * turns_each + 1, answered


async def test_what_cannot_fit_waits_for_nothing(replica: EngineReplica, tmp_path: Path):
    async with replica._turns.turn("other"):
        asked = replace(request(1, "", tmp_path, ()), prompt=TokenPrompt(token_ids=(1,) * 1000))
        with pytest.raises(ContextOverflow):
            async for _ in replica.generate(asked):
                raise AssertionError("it was answered")
        assert replica._turns.num_waiting == 0


async def test_a_deadline_says_what_the_time_went_by_with(replica: EngineReplica, tmp_path: Path):
    write_fake_adapter(tmp_path / "a", head=True)
    held = replica._turns.turn("other")
    async with held:
        with pytest.raises(TurnTimeout):
            async for _ in replica.generate(request(1, "", tmp_path, ("a",), timeout_s=0.01)):
                raise AssertionError("it had a turn")
        refs = (AdapterRef(version="a" * 64, path=str(tmp_path / "a"), name="a"),)
        with pytest.raises(TurnTimeout):
            await replica.classify(
                ClassifyRequest(request_id="c", prompt=TextPrompt(text="hi"), adapters=refs, timeout_s=0.01)
            )
    with pytest.raises(DeadlineExceeded) as caught:
        asked = request(2, "", tmp_path, (), timeout_s=0.03)
        async for _ in replica.generate(replace(asked, sampling=Sampling(max_tokens=200))):
            pass
    assert type(caught.value) is DeadlineExceeded
    assert (replica._turns.num_inside, replica._turns.num_waiting) == (0, 0)
