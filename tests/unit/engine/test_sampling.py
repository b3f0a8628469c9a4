"""Choosing tokens: greedy, cuts, seeds, log-probabilities, rows that cannot be sampled."""

from __future__ import annotations

import math

import torch

from lora_runtime.engine.embedded.sampling import RowSampler, choose
from lora_runtime.engine.protocol import Sampling


def draws(logits: list[float], count: int = 4000, **settings) -> list[float]:
    """Shares of each token."""
    sampler = RowSampler(Sampling(seed=1, **settings), choice=0)
    row = torch.tensor(logits)
    counts = torch.bincount(torch.tensor([sampler.draw(row) for _ in range(count)]), minlength=len(logits))
    return (counts / count).tolist()


def close(got: list[float], want: list[float]) -> bool:
    return all(abs(a - b) < 0.03 for a, b in zip(got, want, strict=True))


LOGITS = [math.log(p) for p in (0.5, 0.25, 0.15, 0.1)]


def test_temperature_zero_takes_the_best():
    assert draws(LOGITS, count=20, temperature=0.0) == [1, 0, 0, 0]


def test_temperature_one_follows_the_distribution():
    assert close(draws(LOGITS, temperature=1.0), [0.5, 0.25, 0.15, 0.1])


def test_a_temperature_reshapes_it():
    squared = [p**2 for p in (0.5, 0.25, 0.15, 0.1)]
    assert close(draws(LOGITS, temperature=0.5), [p / sum(squared) for p in squared])


def test_top_k_keeps_k():
    assert close(draws(LOGITS, temperature=1.0, top_k=2), [2 / 3, 1 / 3, 0, 0])


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    assert close(draws(LOGITS, temperature=1.0, top_p=0.7), [2 / 3, 1 / 3, 0, 0])
    assert close(draws(LOGITS, temperature=1.0, top_p=0.76), [0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0])
    assert draws(LOGITS, count=50, temperature=1.0, top_p=1e-9) == [1, 0, 0, 0]


def test_a_seed_repeats_and_choices_differ():
    row = torch.zeros(1000)

    def run(seed: int, choice: int) -> list[int]:
        sampler = RowSampler(Sampling(seed=seed, temperature=1.0), choice)
        return [sampler.draw(row) for _ in range(5)]

    assert run(3, 0) == run(3, 0)
    assert run(3, 0) != run(3, 1)
    assert run(-5, 0) == run(-5, 0)


def test_log_probabilities_are_of_the_raw_distribution():
    sampler = RowSampler(Sampling(temperature=0.0, logprobs=2), 0)
    chosen = choose(torch.tensor([LOGITS]), [sampler])[0]
    assert chosen.token_id == 0
    assert math.isclose(chosen.logprob, math.log(0.5), abs_tol=1e-6)
    assert [token for token, _ in chosen.top] == [0, 1]
    assert math.isclose(chosen.top[1][1], math.log(0.25), abs_tol=1e-6)


def test_one_broken_row_does_not_spoil_the_others():
    logits = torch.tensor([[1.0, 2.0], [float("nan"), 1.0], [-math.inf, -math.inf], [3.0, -math.inf]])
    samplers = [RowSampler(Sampling(temperature=0.0), 0) for _ in range(4)]
    assert [None if c is None else c.token_id for c in choose(logits, samplers)] == [1, None, None, 0]
