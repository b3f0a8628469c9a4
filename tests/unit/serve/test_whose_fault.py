"""What counts against an arm of an experiment: its own faults, and nothing that a request brings upon itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from lora_runtime.engine.fake import FakeConfig, FakeEngine
from lora_runtime.engine.protocol import (
    AdapterRef,
    Classification,
    ClassifyRequest,
    EngineInfo,
    GenerateRequest,
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
    MemoryExceeded,
    NonFiniteWeights,
    NotFound,
    Overloaded,
    StoreUnavailable,
    TurnTimeout,
)
from lora_runtime.merge.job import JobRecipe, Plan, refused
from serve.assembly import gateway_app
from serve.config import Settings
from serve.engine_client import EngineUnavailable, Events
from serve.experiments.blame import Blame, blame_of
from serve.experiments.definition import ERROR_RATE
from serve.experiments.evidence import ArmEvidence
from serve.gateway.prompt_size import MAX_IDS, MAX_PARTS
from serve.handover import handed_over
from serve.identity import Scope
from serve.intake import Admitted, Named, Source
from serve.intake_replica import IntakeReplica
from serve.registry.database import Database
from serve.registry.evidence import EvidenceReader
from serve.registry.experiments import Experiments
from serve.registry.keys import Keys
from serve.telemetry import Metrics
from tests.fakes import write_fake_adapter

LONG = "word " * 300
IN_PIECES = [{"role": "user", "content": [{"type": "text", "text": "x"}] * 200}] * (MAX_PARTS // 200 + 1)


@pytest.fixture(autouse=True)
def _writes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.experiments.recorder.FLUSH_S", 0.01)


@dataclass
class ScriptedEngines:
    """Implements :class:`serve.engine_client.EngineClient` by a fake engine that fails where it is told to.

    ``calls``: of each request its caller and whether it is a copy. ``failing``: an adapter's name, or None for all
    targets, and its error: raised before the first tokens or, in ``breaking``, after them. ``hangs``: before the first
    tokens, until it is cancelled.
    """

    engine: FakeEngine
    intake: IntakeReplica
    failing: dict[str | None, LoomError] = field(default_factory=dict)
    breaking: dict[str | None, LoomError] = field(default_factory=dict)
    hangs: bool = False
    calls: set[tuple[str, bool]] = field(default_factory=set)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Events]:
        self._fail(self.failing, request)
        if self.hangs:
            await asyncio.Event().wait()
        async for event in self.engine.generate(request):
            yield [event]
            self._fail(self.breaking, request)

    async def classify(self, request: ClassifyRequest) -> Classification:
        self._fail(self.failing, request)
        return await self.engine.classify(request)

    def _fail(self, errors: dict[str | None, LoomError], request: GenerateRequest | ClassifyRequest) -> None:
        self.calls.add((request.caller, request.is_spare))
        for name in (None, *(ref.name for ref in request.adapters)):
            if name in errors:
                raise errors[name]

    async def admit(self, source: Source) -> Admitted:
        return await self.intake.admit(source)

    async def plan(self, recipe: JobRecipe, named: Sequence[Named]) -> Plan:
        raise refused(["these engines have no base to merge into."])

    async def prefetch(self, adapter: AdapterRef) -> None:
        """All adapters are near."""

    async def info(self) -> EngineInfo:
        return self.engine.info


@dataclass
class World:
    """A gateway with the running experiment ``tone`` behind the alias ``tone-model``: ``old`` against ``new``."""

    http: httpx.AsyncClient
    engines: ScriptedEngines
    database: str
    experiment: str
    units: dict[str, list[str]]

    async def complete(self, arm: str, number: int = 0, **body: Any) -> httpx.Response:
        asked = {"model": "tone-model", "prompt": "hi", "user": self.units[arm][number], **body}
        return await self.http.post("/v1/completions", json=asked)

    async def chat(self, arm: str, content: Any, **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        asked = {"model": "tone-model", "messages": messages, "user": self.units[arm][0], **body}
        return await self.http.post("/v1/chat/completions", json=asked)

    async def classify(self, arm: str, number: int = 0, **body: Any) -> httpx.Response:
        asked = {"model": "tone-model", "input": "hi", "user": self.units[arm][number], **body}
        return await self.http.post("/v1/classify", json=asked)

    async def results(self) -> dict[str, Any]:
        """Once everything is written down."""
        await asyncio.sleep(0.15)
        return (await self.http.get("/v1/experiments/tone/results")).json()

    async def evidence(self) -> dict[str, ArmEvidence]:
        """By arm, once everything is written down."""
        await asyncio.sleep(0.15)
        database = Database(self.database)
        try:
            plan = Experiments(database).get(self.experiment).plan
            return dict(EvidenceReader(database).of(self.experiment, 1, plan).arms)
        finally:
            database.close()


@asynccontextmanager
async def world(
    folder: Path,
    *,
    heads: tuple[str, ...] = ("old", "new"),
    num_units: int = 1,
    has_keys: bool = False,
    begun_by: str = "run",
    **definition: Any,
) -> AsyncIterator[World]:
    """With ``num_units`` units of each arm, who have asked for nothing yet."""
    for name in ("old", "new"):
        write_fake_adapter(folder / "adapters" / name, name=name, head=name in heads)
    settings = Settings.model_validate(
        {
            "base": {"name": "base"},
            "engine": {"kind": "fake", "options": {"max_model_len": 200}},
            "state_dir": str(folder / "state"),
            "adapters": {
                "roots": [str(folder / "adapters")],
                "preload": {name: str(folder / "adapters" / name) for name in ("old", "new")},
            },
            "experiments": {"look_every_s": 3600},
            "telemetry": {"log_level": "ERROR"},
            "auth": {"required": has_keys},
        }
    )
    (folder / "state").mkdir(parents=True)
    database = Database(settings.registry_url)
    key, _ = Keys(database).create("me", [Scope.ADMIN])
    database.close()
    engine = FakeEngine(FakeConfig(**settings.engine.options))
    engines = ScriptedEngines(engine, IntakeReplica(handed_over(settings)))
    app = gateway_app(settings, engines, lambda: None)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    client = httpx.AsyncClient(transport=transport, base_url="http://x", headers={"Authorization": f"Bearer {key}"})
    async with app.router.lifespan_context(app), client as http:
        made = {
            "name": "tone",
            "alias": "tone-model",
            "control": "old",
            "arms": [{"name": "old", "target": "old"}, {"name": "new", "target": "new"}],
            **definition,
        }
        created = await http.post("/v1/experiments", json=made)
        assert created.status_code == 201, created.text
        assert (await http.post(f"/v1/experiments/tone/{begun_by}", json={})).status_code == 200
        units: dict[str, list[str]] = {"old": [], "new": []}
        number = 0
        while min(map(len, units.values())) < num_units:
            number += 1
            told = await http.get("/v1/experiments/tone/assignment", params={"unit": f"u{number}"})
            units[told.json()["arm"]].append(f"u{number}")
        yield World(http, engines, settings.registry_url, created.json()["id"], units)


async def _leaves(world: World, ask: Awaitable[Any]) -> None:
    task = asyncio.ensure_future(ask)
    await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _leaves_before_an_answer(world: World) -> None:
    world.engines.hangs = True
    await _leaves(world, world.complete("new"))
    world.engines.hangs = False


Ask = Callable[[World], Awaitable[httpx.Response]]

BY_REQUEST: dict[str, tuple[int, Ask]] = {
    "a prompt that is too long": (400, lambda w: w.complete("new", prompt=LONG)),
    "a chat that is too long": (400, lambda w: w.chat("new", LONG)),
    "one of several prompts that is too long": (400, lambda w: w.complete("new", prompt=["hi", LONG])),
    "a text to classify that is too long": (400, lambda w: w.classify("new", input=LONG)),
    "an answer that is too long": (400, lambda w: w.complete("new", max_tokens=10_000)),
    "a stream that is too long": (400, lambda w: w.complete("new", prompt=LONG, stream=True)),
    "a head that no arm has": (404, lambda w: w.classify("new", head="nonsense")),
    "an image that is none": (
        400,
        lambda w: w.chat("new", [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}]),
    ),
    "an option that is not served": (400, lambda w: w.complete("new", logit_bias={"1": 1})),
    "a prompt without text": (400, lambda w: w.complete("new", prompt=[])),
    "a chat in too many parts": (400, lambda w: w.chat("new", "", messages=IN_PIECES)),
    "a chat to classify in too many parts": (400, lambda w: w.classify("new", input=None, messages=IN_PIECES)),
    "too many token ids": (400, lambda w: w.complete("new", prompt=[1] * (MAX_IDS + 1))),
}
"""What a request can be refused for, with its status."""

REFUSED_AT_THE_DOOR = ("an option that is not served", "a prompt without text", "too many token ids")
"""Before it is known which model is meant."""

REFUSED = {
    "no room": Overloaded("full"),
    "no turn in time": TurnTimeout("late"),
    "an option that the engine refuses": InvalidRequest("no", param="n"),
}
"""What an engine may refuse a request with before it answers."""


async def assert_counted(world: World, what: str = "", *, faults: int, answers: int) -> None:
    rate = (await world.evidence())["new"].metrics[ERROR_RATE]
    assert (rate.y, rate.x) == (faults, faults + answers), what


async def test_what_a_request_is_refused_for_is_no_error_of_its_arm(tmp_path: Path):
    async with world(tmp_path) as found:
        assert (await found.complete("new")).status_code == 200
        for what, (status, ask) in BY_REQUEST.items():
            answer = await ask(found)
            assert answer.status_code == status, (what, answer.text)
            assert ("X-Variant" in answer.headers) == (what not in REFUSED_AT_THE_DOOR), what
            await assert_counted(found, what, faults=0, answers=1)


async def test_load_and_options_are_no_errors_of_an_arm(tmp_path: Path):
    async with world(tmp_path) as found:
        assert (await found.complete("new")).status_code == 200
        for what, error in REFUSED.items():
            found.engines.failing[None] = error
            assert (await found.complete("new")).status_code >= 400
            assert (await found.classify("new")).status_code >= 400
            await assert_counted(found, what, faults=0, answers=1)


async def test_clients_who_leave_are_no_errors_of_an_arm(tmp_path: Path):
    async with world(tmp_path) as found:
        assert (await found.complete("new")).status_code == 200
        for _ in range(3):
            await _leaves_before_an_answer(found)
        await assert_counted(found, faults=0, answers=1)


OWN = {
    "rejected": AdapterRejected("broken"),
    "not finite": NonFiniteWeights("nan"),
    "missing": AdapterMissing("gone"),
    "out of reach": StoreUnavailable("away"),
    "without what is asked for": NotFound("no head"),
    "too wide": InvalidCombination("nine adapters"),
    "too large": MemoryExceeded("too much"),
    "an engine that fails": EngineFault("broke"),
    "an arm that hangs": DeadlineExceeded("late"),
}


@pytest.mark.parametrize("route", ["complete", "classify"])
async def test_an_arms_own_faults_count_against_it(tmp_path: Path, route: str):
    async with world(tmp_path) as found:
        ask = getattr(found, route)
        assert (await ask("new")).status_code == 200
        for number, (what, error) in enumerate(OWN.items(), 1):
            found.engines.failing["new"] = error
            await ask("new")
            await assert_counted(found, what, faults=number, answers=1)


async def test_an_arm_without_a_head_that_the_alias_has_fails_by_itself(tmp_path: Path):
    async with world(tmp_path, heads=("old",)) as found:
        assert (await found.complete("new")).status_code == 200
        answered = await found.classify("new")
        assert answered.status_code == 200 and answered.headers["X-Assignment"] == "fallback"
        await assert_counted(found, faults=1, answers=1)


async def test_a_broken_control_counts_as_any_arm(tmp_path: Path):
    async with world(tmp_path) as found:
        assert (await found.complete("old")).status_code == 200
        found.engines.failing["old"] = AdapterRejected("broken")
        assert (await found.complete("old")).status_code == 400
        rate = (await found.evidence())["old"].metrics[ERROR_RATE]
        assert (rate.y, rate.x) == (1, 2)


async def test_a_broken_arm_cannot_hide_behind_load_but_behind_a_bad_request(tmp_path: Path):
    async with world(tmp_path) as found:
        assert (await found.complete("new")).status_code == 200
        found.engines.failing = {"new": AdapterRejected("broken"), "old": Overloaded("full")}
        assert (await found.complete("new")).status_code == 429
        found.engines.failing["old"] = ContextOverflow("too long")
        assert (await found.complete("new")).status_code == 400
        await assert_counted(found, faults=1, answers=1)


@pytest.mark.parametrize(
    ("error", "body", "faults"),
    [
        (EngineFault("broke"), {}, 1),
        (DeadlineExceeded("late"), {}, 1),
        (DeadlineExceeded("late"), {"ignore_eos": True, "max_tokens": 9}, 0),
        (Overloaded("given up"), {}, 0),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_answers_that_break_off(tmp_path: Path, error: LoomError, body: dict, faults: int, stream: bool):
    async with world(tmp_path) as found:
        assert (await found.complete("new")).status_code == 200
        found.engines.breaking["new"] = error
        await found.complete("new", stream=stream, **body)
        await assert_counted(found, faults=faults, answers=1)


async def test_bad_requests_at_one_arm_breach_no_guardrail_and_hide_no_fault(tmp_path: Path):
    """Of everyone's requests to the treatment, one in two fails by its own fault."""
    guarded = {
        "metrics": [{"name": "liked", "level": "request"}],
        "guardrails": [{"metric": ERROR_RATE, "tolerance": 0.02}, {"metric": "liked", "tolerance": 0.02}],
        "analysis": {"min_units": 10, "units": 100},
    }
    async with world(tmp_path, num_units=40, **guarded) as found:

        async def visit(arm: str, number: int) -> None:
            answered = await found.complete(arm, number)
            told = {"request_id": answered.json()["id"].removeprefix("cmpl-"), "metric": "liked", "value": True}
            assert (await found.http.post("/v1/feedback", json=told)).status_code == 200
            if arm == "new":
                for _ in range(4):
                    assert (await found.classify(arm, number, head="nonsense")).status_code == 404
                    assert (await found.complete(arm, number, prompt=LONG)).status_code == 400

        for arm in ("old", "new"):
            await asyncio.gather(*(visit(arm, number) for number in range(40)))
        results = (await found.results())["results"]
        assert [guardrail["is_breached"] for guardrail in results["guardrails"]] == [False, False], results
        assert all(guardrail["harm"] == 0 for guardrail in results["guardrails"])
        found.engines.failing["new"] = AdapterRejected("broken")
        for _ in range(3):
            await asyncio.gather(*(found.complete("new", number) for number in range(40)))
        evidence = (await found.evidence())["new"].metrics[ERROR_RATE]
        assert evidence.y / evidence.x == 0.75


SHADOWED: dict[str, Any] = {
    "arms": [{"name": "old", "target": "old"}, {"name": "new", "target": "new", "shadow": True}],
    "shadow": {"share": 1.0},
}


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "answered"),
        (AdapterRejected("broken"), "failed"),
        (EngineFault("broke"), "failed"),
        (NotFound("no head"), "failed"),
        (Overloaded("full"), "dropped"),
        (TurnTimeout("late"), "dropped"),
        (ContextOverflow("too long"), "dropped"),
    ],
)
async def test_a_shadow_arm_has_failed_where_it_is_its_own_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: LoomError, outcome: str
):
    counted: list[str] = []
    monkeypatch.setattr(Metrics, "mirrored", lambda _, experiment, variant, outcome: counted.append(outcome))
    async with world(tmp_path, begun_by="shadow", num_units=0, **SHADOWED) as found:
        found.units["old"] = ["someone"]
        if error is not None:
            found.engines.failing["new"] = error
        for ask in (found.complete, found.classify):
            assert (await ask("old")).status_code == 200
        await asyncio.sleep(0.05)
        assert counted == [outcome, outcome]


async def test_engines_hear_who_asks(tmp_path: Path):
    async with world(tmp_path) as found:
        await found.complete("new")
        await found.classify("old")
        assert found.engines.calls == {("", False)}, "nobody needs a key here"
    async with world(tmp_path / "with keys", has_keys=True, begun_by="shadow", num_units=0, **SHADOWED) as found:
        found.units["old"] = ["someone"]
        for route in (found.complete, found.classify, lambda arm: found.chat(arm, "hi")):
            found.engines.calls.clear()
            assert (await route("old")).status_code == 200
            await asyncio.sleep(0.05)
            key = found.http.headers["Authorization"].removeprefix("Bearer loom_").partition("_")[0]
            assert found.engines.calls == {(key, False), (key, True)}, "the key's id, and nothing of its secret"


EVERY = {
    AdapterRejected: Blame.ARM,
    AdapterMissing: Blame.ARM,
    StoreUnavailable: Blame.ARM,
    NotFound: Blame.ARM,
    InvalidCombination: Blame.ARM,
    EngineFault: Blame.ARM,
    EngineUnavailable: Blame.ARM,
    MemoryExceeded: Blame.ARM,
    DeadlineExceeded: Blame.ARM,
    TurnTimeout: Blame.LOAD,
    Overloaded: Blame.LOAD,
    InvalidRequest: Blame.REQUEST,
    InvalidImage: Blame.REQUEST,
    ContextOverflow: Blame.REQUEST,
}


@pytest.mark.parametrize("error", EVERY)
def test_whose_fault_each_error_is(error: type[LoomError]):
    assert blame_of(error("x"), is_default=False) is EVERY[error]
    assert blame_of(None, is_default=False) is Blame.LEFT
    is_unfit = error in (NotFound, InvalidCombination)
    assert blame_of(error("x"), is_default=True) is (Blame.REQUEST if is_unfit else EVERY[error])
