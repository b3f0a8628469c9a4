"""How far a merge is, and how long it takes yet."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from serve.registry.merges import MergeJob, MergeState, MergeUnit
from serve.schemas.merges import progress_of

NOW = datetime(2026, 1, 1, tzinfo=UTC)
JOB = MergeJob(
    id="merge_1",
    name="made",
    target="",
    state=MergeState.MERGING,
    plan={},
    plan_id="",
    actor="",
    created_at=NOW,
    started_at=NOW,
    ended_at=None,
    trials=(),
    report=None,
    error=None,
    is_cancelled=False,
    fence=1,
)


def units(*done: int) -> list[MergeUnit]:
    return [MergeUnit(unit=str(n), kind="merge", num_bytes=100, done_bytes=so_far) for n, so_far in enumerate(done)]


def test_the_rest_takes_as_long_as_what_is_done_did():
    assert progress_of(JOB, units(100, 0, 0, 0), NOW + timedelta(seconds=10)) == (0.25, 30.0)
    assert progress_of(JOB, units(100, 50), NOW + timedelta(seconds=30)) == (0.75, 10.0)


def test_nothing_is_told_where_nothing_is_known():
    assert progress_of(JOB, [], NOW) == (0.0, None)
    assert progress_of(JOB, units(0, 0), NOW + timedelta(seconds=5)) == (0.0, None)
    assert progress_of(replace(JOB, started_at=None), units(50), NOW) == (0.5, None)


def test_an_end_is_an_end():
    succeeded = replace(JOB, state=MergeState.SUCCEEDED, ended_at=NOW)
    assert progress_of(succeeded, units(0), NOW) == (1.0, 0.0)
    assert progress_of(replace(JOB, state=MergeState.FAILED, ended_at=NOW), units(50), NOW) == (0.5, None)
