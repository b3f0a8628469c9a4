"""The search for weights on landscapes whose best weights are known: what it finds and sees, and that it repeats."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lora_runtime.engine.protocol import ChatPrompt, Message, TextPart
from lora_runtime.errors import EngineFault, InvalidRequest
from lora_runtime.merge.examples import Example
from lora_runtime.merge.search import Search, SearchResult, Trial, propose, search, split

BEST = {"a": 0.8, "b": 0.3}


def examples(*tasks: str, count: int = 10) -> list[Example]:
    return [
        Example(
            prompt=ChatPrompt(messages=(Message(role="user", parts=(TextPart(text=f"{task} {n}"),)),)),
            answer=str(n),
            task=task,
        )
        for task in tasks
        for n in range(count)
    ]


def spec(**more: object) -> Search:
    return Search.model_validate({"examples": "examples.jsonl", **more})


class Landscape:
    """Scores that fall with the distance from ``best``, each example's a little otherwise. Keeps all calls."""

    def __init__(self, best: Mapping[str, float] = BEST) -> None:
        self._best = best
        self.calls: list[tuple[dict[str, float], tuple[Example, ...]]] = []

    async def __call__(self, weights: Mapping[str, float], asked: Sequence[Example]) -> list[float]:
        self.calls.append((dict(weights), tuple(asked)))
        distance = sum((weights[name] - value) ** 2 for name, value in self._best.items())
        return [max(0.0, 1 - distance / (2 + int(example.answer) / 10)) for example in asked]


async def test_it_finds_what_is_best_and_tells_it_beside_the_plain_choices():
    landscape = Landscape()
    found = await search(spec(trials=25), ["a", "b"], examples("x", "y"), landscape)
    for name, weight in BEST.items():
        assert found.winner.weights[name] == pytest.approx(weight, abs=0.1)
    assert len(found.trials) == 25 and found.winner.search == max(trial.score for trial in found.trials)
    plain = {baseline.name: baseline.weights for baseline in found.baselines}
    assert plain == {
        "all 1": {"a": 1.0, "b": 1.0},
        "mean": {"a": 0.5, "b": 0.5},
        "a alone": {"a": 1.0, "b": 0.0},
        "b alone": {"a": 0.0, "b": 1.0},
    }
    assert [trial.weights for trial in found.trials[:4]] == list(plain.values())
    assert all(found.winner.held_out > baseline.held_out for baseline in found.baselines)
    assert (found.num_search, found.num_held_out, found.seed) == (14, 6, 0)
    assert found.optimiser.startswith("optuna 5.")
    assert SearchResult.model_validate_json(json.dumps(found.model_dump(mode="json"))) == found


class Skills(Landscape):
    """A task of each adapter's, which the other disturbs; ``x`` is easier, and can be had at the cost of ``y``."""

    async def __call__(self, weights: Mapping[str, float], asked: Sequence[Example]) -> list[float]:
        return [skill(example.task, weights["a"], weights["b"]) for example in asked]


def skill(task: str, a: float, b: float) -> float:
    if task == "x":
        return max(0.0, 1 - (a - 1) ** 2 - 0.05 * b**2)
    return max(0.0, 0.8 - 0.2 * (b - 1) ** 2 - 0.3 * a**2)


def best_on_a_grid(objective: Callable[[Sequence[float]], float]) -> tuple[float, float, float]:
    """The best value of an objective of both tasks' scores, and where it is."""
    steps = [-0.5 + 0.02 * n for n in range(101)]
    return max((objective([skill(task, a, b) for task in "xy"]), a, b) for a in steps for b in steps)


async def test_it_aims_at_the_mean_or_at_the_worst_task():
    """As a grid over all weights finds them."""
    worst_task = {}
    for objective, of in (("mean", fmean), ("worst", min)):
        want, a, b = best_on_a_grid(of)
        found = await search(spec(trials=25, objective=objective), ["a", "b"], examples("x", "y"), Skills())
        assert found.winner.search == pytest.approx(want, abs=0.01) == found.winner.held_out
        assert found.winner.weights == {"a": pytest.approx(a, abs=0.12), "b": pytest.approx(b, abs=0.25)}
        assert all(trial.score == of(trial.tasks.values()) for trial in found.trials)
        worst_task[objective] = min(found.winner.held_out_tasks.values())
    assert worst_task["worst"] > worst_task["mean"] + 0.08


async def test_what_is_held_out_is_seen_only_when_all_is_tried():
    landscape = Landscape()
    given_ = examples("x", "y")
    found = await search(spec(trials=8), ["a", "b"], given_, landscape)
    seen, unseen = split(given_, 0.3, 0)
    assert [call[1] for call in landscape.calls[:8]] == [tuple(seen)] * 8
    assert [call[1] for call in landscape.calls[8:]] == [tuple(unseen)] * (len(landscape.calls) - 8)
    assert [call[0] for call in landscape.calls[:8]] == [trial.weights for trial in found.trials]

    async def otherwise(weights: Mapping[str, float], asked: Sequence[Example]) -> list[float]:
        scores = await landscape(weights, asked)
        return [0.0 if example in unseen else score for example, score in zip(asked, scores, strict=True)]

    again = await search(spec(trials=8), ["a", "b"], given_, otherwise)
    assert again.trials == found.trials and again.winner.held_out == 0.0


async def test_it_repeats_by_its_seed_and_not_by_the_order_of_names_or_examples():
    given_ = examples("x", "y")
    first = await search(spec(trials=9, seed=3), ["a", "b"], given_, Landscape())
    shuffled = random.Random(1).sample(given_, len(given_))
    assert await search(spec(trials=9, seed=3), ["b", "a"], shuffled, Landscape()) == first
    other = await search(spec(trials=9, seed=4), ["a", "b"], given_, Landscape())
    assert [trial.weights for trial in other.trials[:4]] == [trial.weights for trial in first.trials[:4]]
    assert [trial.weights for trial in other.trials[4:]] != [trial.weights for trial in first.trials[4:]]


@pytest.mark.parametrize("count", [0, 2, 4, 7, 9])
async def test_what_was_cut_off_goes_on_as_if_it_had_not_been(count: int):
    """Trials that went through a file and another process's memory."""
    whole = await search(spec(trials=9), ["a", "b"], examples("x"), Landscape())
    landscape = Landscape()
    told: list[Trial] = []

    async def on_trial(trial: Trial) -> None:
        told.append(trial)

    known = [Trial.model_validate_json(trial.model_dump_json()) for trial in whole.trials[:count]]
    found = await search(spec(trials=9), ["a", "b"], examples("x"), landscape, on_trial, known=known)
    assert found == whole
    assert tuple(told) == whole.trials[count:]
    assert [call[0] for call in landscape.calls[: 9 - count]] == [trial.weights for trial in told]


async def test_tasks_count_the_same_however_many_examples_they_have():
    async def right_on_x(_: Mapping[str, float], asked: Sequence[Example]) -> list[float]:
        return [float(example.task == "x") for example in asked]

    given_ = [*examples("x", count=2), *examples("y", count=40)]
    found = await search(spec(trials=1), ["a"], given_, right_on_x)
    assert found.winner.search == 0.5 and found.winner.held_out == 0.5
    assert found.winner.held_out_tasks == {"x": 1.0, "y": 0.0}
    assert len(found.trials) == 1, "one adapter's plain choices are one"


async def test_the_plain_choices_are_tried_in_any_case_and_win_where_nothing_is_better():
    async def level(_: Mapping[str, float], asked: Sequence[Example]) -> list[float]:
        return [0.5] * len(asked)

    found = await search(spec(trials=1), ["a", "b", "c"], examples("x"), level)
    assert len(found.trials) == 5
    found = await search(spec(trials=8), ["a", "b", "c"], examples("x"), level)
    assert len(found.trials) == 8 and found.winner.weights == {"a": 1.0, "b": 1.0, "c": 1.0}
    small = await search(spec(trials=8, l1=0.1), ["a", "b", "c"], examples("x"), level)
    assert sum(abs(weight) for weight in small.winner.weights.values()) <= 1.0


async def test_weights_stay_between_their_bounds_and_are_not_tried_twice():
    """The best is out of reach: every proposal would like the same corner."""
    found = await search(spec(trials=16, low=0, high=1.25), ["a", "b"], examples("x"), Landscape({"a": 9.0, "b": 9.0}))
    assert all(0 <= weight <= 1.25 for trial in found.trials for weight in trial.weights.values())
    assert len({tuple(trial.weights.values()) for trial in found.trials}) == 16


async def test_an_engines_fault_ends_the_search_and_passes():
    async def fails(_: Mapping[str, float], __: Sequence[Example]) -> list[float]:
        raise EngineFault("broken")

    with pytest.raises(EngineFault, match="broken"):
        await search(spec(), ["a"], examples("x"), fails)


@pytest.mark.parametrize(
    ("names", "given_", "said"),
    [
        ([], examples("x"), "1 to 64"),
        (["a", "a"], examples("x"), "each once"),
        (["a"], [], "no examples"),
        (["a"], examples("x", count=1), "'x' has one example"),
        (["a"], [*examples("x"), *examples("x")], "ask the same"),
    ],
)
async def test_what_cannot_be_searched(names: list[str], given_: list[Example], said: str):
    with pytest.raises(InvalidRequest, match=said):
        await search(spec(), names, given_, Landscape({}))


async def test_known_trials_of_other_adapters_are_refused():
    known = [Trial(weights={"a": 1.0, "c": 1.0}, tasks={"x": 0.5}, score=0.5)]
    with pytest.raises(InvalidRequest, match="other adapters"):
        await search(spec(), ["a", "b"], examples("x"), Landscape(), known=known)


@pytest.mark.parametrize(
    "more",
    [{"trials": 0}, {"trials": 1001}, {"held_out": 0}, {"low": 0.1}, {"high": 0.9}, {"metric": "bleu"}, {"sead": 1}],
)
def test_a_search_that_makes_no_sense(more: dict[str, object]):
    with pytest.raises(ValidationError, match=next(iter(more))):
        spec(**more)


@given(
    st.dictionaries(st.sampled_from("xyz"), st.integers(2, 30), min_size=1), st.floats(0.01, 0.99), st.integers(0, 99)
)
def test_a_split_has_its_share_of_every_task(counts: dict[str, int], held_out: float, seed: int):
    given_ = [example for task, count in counts.items() for example in examples(task, count=count)]
    seen, unseen = split(given_, held_out, seed)
    assert sorted(seen + unseen, key=given_.index) == given_
    for task, count in counts.items():
        away = sum(example.task == task for example in unseen)
        assert 1 <= away <= count - 1 and abs(away - held_out * count) <= 1
    turned = split(given_[::-1], held_out, seed)
    assert [side[::-1] for side in turned] == [seen, unseen]


@settings(max_examples=5)
@given(st.integers(0, 5))
def test_what_is_tried_next_follows_from_what_was_tried(seed: int):
    trials = [Trial(weights={"a": w, "b": 1 - w}, tasks={}, score=w / 2) for w in (0.0, 0.3, 1.0)]
    first = propose(spec(seed=seed), ["a", "b"], trials)
    assert propose(spec(seed=seed), ["a", "b"], trials) == first
    assert all(round(weight, 4) == weight for weight in first.values())
