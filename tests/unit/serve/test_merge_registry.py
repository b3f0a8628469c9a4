"""Merge jobs in the registry: one owner at a time, and nothing from those who lost their lease."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from lora_runtime.errors import Conflict, NotFound
from serve.registry.database import Database
from serve.registry.merges import Checkpoint, LeaseLost, MergeJob, Merges, MergeState, MergeUnit
from serve.registry.repository import Repository


def plan(product: str = "adapter") -> dict[str, object]:
    return {"recipe": {"product": product, "method": "linear", "name": "both"}}


@pytest.fixture
def merges(url: str) -> Merges:
    return Merges(Database(url))


def create(merges: Merges, name: str = "both", product: str = "adapter", target: str = "") -> MergeJob:
    return merges.create(name, plan(product), "a" * 64, actor="ada", target=target)


def checkpoint(job: MergeJob) -> Checkpoint:
    return Checkpoint(
        name=job.name,
        version="b" * 64,
        location="/merges/both",
        base="base",
        job=job.id,
        parents={"shape": "c" * 64},
        num_bytes=3 << 40,
        created_at=datetime.now(UTC),
    )


def test_a_job_is_done_by_one_owner_in_order_of_age(merges: Merges):
    first, second = create(merges, "one"), create(merges, "two")
    assert first.state is MergeState.QUEUED and merges.num_open() == 2
    claimed = merges.claim("me", 60)
    assert claimed is not None and claimed.id == first.id and claimed.started_at is not None
    other = merges.claim("you", 60)
    assert other is not None and other.id == second.id
    assert merges.claim("me", 60) is None
    merges.move(claimed, MergeState.MERGING, "begun")
    merges.set_units(claimed, [MergeUnit(unit=name, kind="merge", num_bytes=5 << 30) for name in "ab"])
    merges.set_units(claimed, [MergeUnit(unit="b", kind="merge", num_bytes=5 << 30, state="done")], first=1)
    assert [(unit.unit, unit.state) for unit in merges.units(first.id)] == [("a", "waiting"), ("b", "done")]
    merges.finish(claimed, MergeState.SUCCEEDED, "made", report={"warnings": []})
    done = merges.get(first.id)
    assert done.state is MergeState.SUCCEEDED and done.report == {"warnings": []} and done.ended_at is not None
    lines = merges.log(first.id)
    assert [line.message for line in lines] == ["begun", "made"]
    assert [line.message for line in merges.log(first.id, after=lines[0].id)] == ["made"]
    assert [job.id for job in merges.all()] == [second.id, first.id]
    assert [job.id for job in merges.all(state=MergeState.SUCCEEDED)] == [first.id]


def test_who_lost_the_lease_changes_nothing(merges: Merges):
    create(merges)
    old = merges.claim("old", -1)
    assert old is not None
    new = merges.claim("new", 60)
    assert new is not None and new.fence > old.fence
    for change in (
        lambda: merges.renew(old, 60),
        lambda: merges.move(old, MergeState.VERIFYING, "late"),
        lambda: merges.say(old, "late"),
        lambda: merges.tried(old, []),
        lambda: merges.set_units(old, []),
        lambda: merges.release(old),
        lambda: merges.finish(old, MergeState.FAILED, "late"),
    ):
        with pytest.raises(LeaseLost):
            change()
    assert merges.get(new.id).state is MergeState.QUEUED and merges.log(new.id) == []
    assert merges.renew(new, 60).fence == new.fence
    merges.release(new)
    assert merges.claim("third", 60) is not None


def test_claims_at_once_give_each_job_to_one(merges: Merges):
    made = {create(merges, f"job-{number}").id for number in range(6)}
    with ThreadPoolExecutor(4) as pool:
        claimed = [job.id for job in pool.map(lambda n: merges.claim(str(n), 60), range(12)) if job is not None]
    assert sorted(claimed) == sorted(made)


def test_a_name_is_made_once_at_a_time(merges: Merges):
    create(merges)
    with pytest.raises(Conflict, match=r"being made already, by merge_"):
        create(merges)
    create(merges, target="/elsewhere/both")
    job = merges.claim("me", 60)
    assert job is not None and job.target == "" and merges.under_way("both") == merges.get(job.id)
    merges.finish(job, MergeState.FAILED, "no disk")
    assert merges.get(job.id).error == "no disk" and merges.under_way("both") is None
    create(merges)


def test_a_checkpoint_comes_with_its_jobs_end_and_keeps_its_name(merges: Merges):
    job = create(merges, product="checkpoint")
    claimed = merges.claim("me", 60)
    assert claimed is not None
    merges.finish(claimed, MergeState.SUCCEEDED, "made", report={}, checkpoint=checkpoint(job))
    assert merges.checkpoint("both").parents == {"shape": "c" * 64}
    assert [found.num_bytes for found in merges.checkpoints()] == [3 << 40]
    with pytest.raises(Conflict, match="a checkpoint 'both' already"):
        create(merges, product="checkpoint")
    with pytest.raises(NotFound):
        merges.checkpoint("other")


def test_a_cancelled_job_is_told_to_its_owner(merges: Merges):
    job = create(merges)
    claimed = merges.claim("me", 60)
    assert claimed is not None and not merges.renew(claimed, 60).is_cancelled
    assert merges.cancel(job.id, actor="ada").is_cancelled
    assert merges.renew(claimed, 60).is_cancelled
    merges.finish(claimed, MergeState.CANCELLED, "cancelled")
    merges.cancel(job.id, actor="ada")
    with pytest.raises(NotFound, match="no merge 'merge_0'"):
        merges.cancel("merge_0", actor="ada")
    with pytest.raises(NotFound):
        merges.get("merge_0")


def test_what_was_done_is_in_the_audit_and_moves_no_revision(url: str):
    database = Database(url)
    merges, repository = Merges(database), Repository(database)
    before = repository.revision()
    job = create(merges)
    claimed = merges.claim("me", 60)
    assert claimed is not None
    merges.tried(claimed, [{"weights": {"a": 1.0}}])
    assert merges.get(job.id).trials == ({"weights": {"a": 1.0}},)
    merges.finish(claimed, MergeState.FAILED, "x")
    assert [(row.action, row.actor) for row in repository.audit(subject=job.id)] == [
        ("merge.failed", "ada"), ("merge.create", "ada"),
    ]  # fmt: skip
    assert repository.revision() == before


def test_jobs_beyond_reach_take_no_place_in_a_list(merges: Merges):
    ours = [create(merges, f"ours-{number}") for number in range(2)]
    for number in range(3):
        create(merges, f"theirs-{number}")
    found = merges.all(limit=2, reaches=lambda name: name.startswith("ours-"))
    assert [job.id for job in found] == [job.id for job in reversed(ours)]
    assert len(merges.all(limit=2)) == 2
