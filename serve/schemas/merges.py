"""Bodies of merges and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from lora_runtime.merge.job import JobRecipe, Plan
from serve.registry.merges import Checkpoint, MergeJob, MergeLine, MergeState, MergeUnit


class MergeRequest(JobRecipe):
    """A merge: by which ``method`` (see the README), of which ``inputs``, into what ``product``, under which ``name``.

    Inputs are adapters as requests name them (``shape``, ``shape@prod``), with a weight: a number, numbers spread over
    the layers, or numbers by pattern of module names.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "name": "both",
                    "method": "svd",
                    "rank": 16,
                    "inputs": [{"adapter": "shape", "weight": 0.7}, {"adapter": "french", "weight": 0.5}],
                },
                {
                    "name": "shape-full",
                    "product": "checkpoint",
                    "method": "linear",
                    "inputs": [{"adapter": "shape"}],
                },
            ]
        }
    )

    def recipe(self) -> JobRecipe:
        return JobRecipe.model_validate(self.model_dump())


class PlanAnswer(BaseModel):
    """What a merge would take. ``memory_bytes``: of each task; ``probe_bytes``: of the one that runs the result."""

    object: Literal["merge.plan"] = "merge.plan"
    id: str
    name: str
    product: str
    base: str
    base_revision: str
    inputs: list[dict[str, Any]]
    num_tasks: int
    output_bytes: int
    disk_bytes: int
    memory_bytes: int
    probe_bytes: int
    warnings: list[str]

    @classmethod
    def of(cls, plan: Plan) -> PlanAnswer:
        return cls(
            id=plan.id,
            name=plan.recipe.name,
            product=plan.recipe.product,
            base=plan.base.name,
            base_revision=plan.base.revision,
            inputs=[found.model_dump(exclude={"location"}) for found in plan.inputs],
            num_tasks=len(plan.units),
            output_bytes=plan.output_bytes,
            disk_bytes=plan.disk_bytes,
            memory_bytes=plan.memory_bytes,
            probe_bytes=plan.probe_bytes,
            warnings=list(plan.warnings),
        )


class TaskAnswer(BaseModel):
    """One task of a merge. ``peak_bytes``: the most memory its process had."""

    id: str
    kind: str
    state: str
    num_bytes: int
    done_bytes: int
    node: str
    seconds: float | None
    peak_bytes: int | None


class MergeAnswer(BaseModel):
    """A merge as it stands. ``progress``: from 0 to 1; ``eta_s``: about how long it takes yet, where that can be told.
    ``report``: what was measured, once it has ended well; ``error``: why it did not."""

    id: str
    object: Literal["merge"] = "merge"
    name: str
    product: str
    method: str
    state: MergeState
    progress: float
    eta_s: float | None
    created: datetime
    started: datetime | None
    ended: datetime | None
    created_by: str
    recipe: dict[str, Any]
    tasks: list[TaskAnswer]
    trials: list[dict[str, Any]]
    error: str | None
    report: dict[str, Any] | None

    @classmethod
    def of(cls, job: MergeJob, units: Sequence[MergeUnit] = ()) -> MergeAnswer:
        progress, eta_s = progress_of(job, units, datetime.now(UTC))
        recipe = job.plan["recipe"]
        return cls(
            id=job.id,
            name=job.name,
            product=recipe["product"],
            method=recipe["method"],
            state=job.state,
            progress=progress,
            eta_s=eta_s,
            created=job.created_at,
            started=job.started_at,
            ended=job.ended_at,
            created_by=job.actor,
            recipe=recipe,
            tasks=[
                TaskAnswer(
                    id=unit.unit,
                    kind=unit.kind,
                    state=unit.state,
                    num_bytes=unit.num_bytes,
                    done_bytes=unit.done_bytes,
                    node=unit.node,
                    seconds=unit.seconds,
                    peak_bytes=unit.peak_bytes,
                )
                for unit in units
            ],
            trials=[dict(trial) for trial in job.trials],
            error=job.error,
            report=None if job.report is None else dict(job.report),
        )


class MergeList(BaseModel):
    """Merges without their tasks and reports, newest first."""

    object: Literal["list"] = "list"
    data: list[MergeAnswer]


class LineAnswer(BaseModel):
    id: int
    at: datetime
    level: str
    message: str

    @classmethod
    def of(cls, line: MergeLine) -> LineAnswer:
        return cls(id=line.id, at=line.at, level=line.level, message=line.message)


class LogAnswer(BaseModel):
    """Lines of a merge's log, oldest first; ``after`` of the next call: the last one's id."""

    object: Literal["list"] = "list"
    data: list[LineAnswer]


class CheckpointAnswer(BaseModel):
    """A merged base. ``parents``: versions of the adapters that went in, by the names that the recipe had for them."""

    id: str
    object: Literal["checkpoint"] = "checkpoint"
    version: str
    location: str
    base: str
    merge: str
    parents: Mapping[str, str]
    num_bytes: int
    created: datetime

    @classmethod
    def of(cls, found: Checkpoint) -> CheckpointAnswer:
        return cls(
            id=found.name,
            version=found.version,
            location=found.location,
            base=found.base,
            merge=found.job,
            parents=found.parents,
            num_bytes=found.num_bytes,
            created=found.created_at,
        )


class CheckpointList(BaseModel):
    object: Literal["list"] = "list"
    data: list[CheckpointAnswer]


def progress_of(job: MergeJob, units: Sequence[MergeUnit], now: datetime) -> tuple[float, float | None]:
    """The share of a job's bytes that are written and checked, and how long the rest takes at the pace so far."""
    if job.state is MergeState.SUCCEEDED:
        return 1.0, 0.0
    total = sum(unit.num_bytes for unit in units)
    done = sum(unit.done_bytes for unit in units) / total if total else 0.0
    if job.ended_at is not None or job.started_at is None or not 0 < done < 1:
        return round(done, 4), None
    spent = (now - job.started_at).total_seconds()
    return round(done, 4), round(spent * (1 - done) / done, 1)
