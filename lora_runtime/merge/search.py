"""Which weights make the best combination: a search over vectors of weights, each tried at run time and never built.

The optimiser sees the search split only; what it found is told from the held-out split, beside the plain choices that
it has to beat. A search is a function of its seed and of the trials so far, so one that was cut off goes on from those.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.metadata import version
from statistics import fmean
from typing import Literal

from pydantic import Field

from lora_runtime.errors import InvalidRequest
from lora_runtime.merge.examples import Example, MetricName
from lora_runtime.merge.recipe import MAX_INPUTS, Part

Weights = Mapping[str, float]
Evaluate = Callable[[Weights, Sequence[Example]], Awaitable[list[float]]]
"""A score from 0 to 1 for each example, by the combination with these weights."""
OnTrial = Callable[["Trial"], Awaitable[None]]


class Search(Part):
    """How to look for weights.

    ``examples``: a file as :func:`~lora_runtime.merge.examples.read_examples` reads it, its lines scored by ``metric``
    where they name none. ``trials``: vectors to try, the plain ones included, which are tried in any case.
    ``held_out``: the share of each task's examples that the search does not see. Weights are looked for from ``low`` to
    ``high``. ``at_once``: requests under way together. ``l1``: what is taken off a score for each unit of the weights'
    mean size (LoraHub, arXiv 2307.13269, whose code has 0.05). ``max_tokens``: of an answer. ``objective``: what is
    looked for, the best mean of the tasks' scores or the best score of the worst task; both count a task once, however
    many examples it has.
    """

    examples: str = Field(min_length=1, max_length=4096)
    metric: MetricName = "exact"
    trials: int = Field(default=40, ge=1, le=1000)
    held_out: float = Field(default=0.3, gt=0, lt=1)
    low: float = Field(default=-0.5, ge=-10, le=0, allow_inf_nan=False)
    high: float = Field(default=1.5, ge=1, le=10, allow_inf_nan=False)
    at_once: int = Field(default=16, ge=1, le=1024)
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    max_tokens: int = Field(default=64, ge=1, le=4096)
    l1: float = Field(default=0.0, ge=0, le=1)
    objective: Literal["mean", "worst"] = "mean"

    def score(self, tasks: Mapping[str, float]) -> float:
        """Of scores by task."""
        return fmean(tasks.values()) if self.objective == "mean" else min(tasks.values())


class Trial(Part):
    """Weights that were tried, and what they scored on the search split: by task, and by the search's objective."""

    weights: dict[str, float]
    tasks: dict[str, float]
    score: float = Field(ge=0, le=1)


class Candidate(Part):
    """Weights with their scores on both splits, by the search's objective. ``name``: "found", or which of the plain
    choices they are."""

    name: str
    weights: dict[str, float]
    search: float
    held_out: float
    held_out_tasks: dict[str, float]


class SearchResult(Part):
    """``winner``: of all trials the best on the search split. ``baselines``: every weight 1, every weight 1/n, and
    each adapter alone; one of them may be the winner. ``trials`` in the order in which they were made."""

    winner: Candidate
    baselines: tuple[Candidate, ...]
    trials: tuple[Trial, ...]
    num_search: int
    num_held_out: int
    seed: int
    optimiser: str


async def search(
    spec: Search,
    names: Sequence[str],
    examples: Sequence[Example],
    evaluate: Evaluate,
    on_trial: OnTrial | None = None,
    *,
    known: Sequence[Trial] = (),
) -> SearchResult:
    """Tries weights for ``names`` one vector after another and awaits ``on_trial`` after each new one.

    ``known``: an earlier search's trials in their order, of the same names, examples and settings; they are not tried
    again, and the result is that of a search which was not cut off. What ``evaluate`` raises passes through, as
    InvalidRequest does for names or examples that cannot be searched over.
    """
    names = _checked(names, known)
    seen, unseen = split(examples, spec.held_out, spec.seed)
    trials = list(known)
    for weights in _plain(names).values():
        if all(trial.weights != weights for trial in trials):
            await _try(spec, weights, seen, evaluate, trials, on_trial)
    while len(trials) < spec.trials:
        # A model of all trials so far is fitted: too long for an event loop that others share.
        weights = await asyncio.to_thread(propose, spec, names, trials)
        await _try(spec, weights, seen, evaluate, trials, on_trial)
    best = max(trials, key=lambda trial: _objective(spec, trial))
    candidates = {"found": best.weights, **_plain(names)}
    told: list[Candidate] = []
    for name, weights in candidates.items():
        first = next((candidate for candidate in told if candidate.weights == weights), None)
        tasks = first.held_out_tasks if first else _by_task(unseen, await evaluate(weights, unseen))
        score = next(trial.score for trial in trials if trial.weights == weights)
        told.append(
            Candidate(name=name, weights=weights, search=score, held_out=spec.score(tasks), held_out_tasks=tasks)
        )
    return SearchResult(
        winner=told[0],
        baselines=tuple(told[1:]),
        trials=tuple(trials),
        num_search=len(seen),
        num_held_out=len(unseen),
        seed=spec.seed,
        optimiser=f"optuna {version('optuna')} GPSampler",
    )


def split(examples: Sequence[Example], held_out: float, seed: int) -> tuple[list[Example], list[Example]]:
    """The examples to search on, and ``held_out`` of them to report on, task by task; both in the order given.

    An example's side follows from the seed and from what it and the others of its task ask, not from their order.
    Raises InvalidRequest where a task has fewer than two examples, or two examples ask the same.
    """
    keys = [example.digest for example in examples]
    if len(set(keys)) < len(keys):
        raise InvalidRequest("Two examples ask the same, and may come to both sides of the split. Leave one out.")
    tasks: dict[str, list[tuple[bytes, int]]] = defaultdict(list)
    for place, (key, example) in enumerate(zip(keys, examples, strict=True)):
        drawn = hashlib.blake2b(f"{seed}/".encode() + key, digest_size=16).digest()
        tasks[example.task].append((drawn, place))
    if not tasks:
        raise InvalidRequest("There are no examples to search over.")
    unseen: set[int] = set()
    for task, members in tasks.items():
        if len(members) < 2:
            said = f"The task '{task}' has one example; two are needed, to search on and to report on."
            raise InvalidRequest(said, task=task)
        count = min(max(1, round(held_out * len(members))), len(members) - 1)
        unseen.update(place for _, place in sorted(members)[:count])
    return (
        [example for place, example in enumerate(examples) if place not in unseen],
        [example for place, example in enumerate(examples) if place in unseen],
    )


def propose(spec: Search, names: Sequence[str], trials: Sequence[Trial]) -> dict[str, float]:
    """The weights to try after ``trials``: where a Gaussian process fitted to their scores promises most improvement.

    A pure function: a new sampler each time, seeded by the search's seed and by how many trials there are.
    """
    import optuna

    # By a handler of its own, Optuna tells stderr of each study, and of a package that would make it faster.
    logging.getLogger("optuna").setLevel(logging.ERROR)
    space = {name: optuna.distributions.FloatDistribution(spec.low, spec.high) for name in names}
    past = [
        optuna.trial.create_trial(params=trial.weights, distributions=dict(space), value=_objective(spec, trial))
        for trial in trials
    ]
    drawn = hashlib.blake2b(f"{spec.seed}/{len(trials)}".encode(), digest_size=4).digest()
    seed = int.from_bytes(drawn, "big")
    samplers = (optuna.samplers.GPSampler(seed=seed, n_startup_trials=0), optuna.samplers.RandomSampler(seed=seed))
    weights: dict[str, float] = {}
    for sampler in samplers:
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.add_trials(past)
        weights = {name: round(value, 4) for name, value in study.ask(dict(space)).params.items()}
        # A vertex of the space may promise most even where it was tried.
        if all(trial.weights != weights for trial in trials):
            break
    return weights


async def _try(
    spec: Search,
    weights: dict[str, float],
    seen: Sequence[Example],
    evaluate: Evaluate,
    trials: list[Trial],
    on_trial: OnTrial | None,
) -> None:
    tasks = _by_task(seen, await evaluate(weights, seen))
    trials.append(Trial(weights=weights, tasks=tasks, score=spec.score(tasks)))
    if on_trial is not None:
        await on_trial(trials[-1])


def _plain(names: Sequence[str]) -> dict[str, dict[str, float]]:
    """What anybody would try first, by what it is called."""
    return {
        "all 1": dict.fromkeys(names, 1.0),
        "mean": dict.fromkeys(names, 1 / len(names)),
        **{f"{alone} alone": {name: float(name == alone) for name in names} for alone in names},
    }


def _by_task(examples: Sequence[Example], scores: Sequence[float]) -> dict[str, float]:
    found: dict[str, list[float]] = defaultdict(list)
    for example, score in zip(examples, scores, strict=True):
        found[example.task].append(score)
    return {task: fmean(found[task]) for task in sorted(found)}


def _objective(spec: Search, trial: Trial) -> float:
    return trial.score - spec.l1 * fmean(abs(weight) for weight in trial.weights.values())


def _checked(names: Sequence[str], known: Sequence[Trial]) -> list[str]:
    """In an order of their own, so that the search does not depend on how they were given."""
    if not 1 <= len(names) <= MAX_INPUTS or len(set(names)) < len(names):
        raise InvalidRequest(f"A search takes 1 to {MAX_INPUTS} adapters, each once; here are {len(names)}.")
    for trial in known:
        if set(trial.weights) != set(names):
            raise InvalidRequest("A known trial has weights of other adapters; start the search without it.")
    return sorted(names)
