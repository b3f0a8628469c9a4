"""One merge job, from its plan to its end: search, merge, verify, publish, register. Decides; tasks do.

Every step may be gone through again: what is recorded as done is not done twice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from lora_runtime.errors import MergeRefused
from lora_runtime.merge.job import Plan
from lora_runtime.merge.manifest import manifest_of, report_of
from lora_runtime.store.protocol import Store
from serve.config import Settings
from serve.jobs.cluster import Call, Progress, RayTasks
from serve.jobs.workload import ASSEMBLY, PROBE, check_of, work_of
from serve.registry.errors import RegistryUnavailable
from serve.registry.garbage import Garbage
from serve.registry.merges import Checkpoint, MergeJob, Merges, MergeState, MergeUnit
from serve.registry.records import SHOWN
from serve.registry.repository import Repository

LEASE_S = 15.0
RENEW_S = 3.0
HOLD_S = 600.0
SMALL_TASK_BYTES = 512 << 20
"""Of memory, for a task that holds no weights."""


class Stopped(Exception):
    """Whoever works on the job is to let go of it; its state stays."""


class Cancelled(Exception):
    """Somebody asked for the job to end."""


class MergeRun:
    """Carries one claimed job out, in a thread of its own."""

    def __init__(
        self,
        job: MergeJob,
        settings: Settings,
        *,
        merges: Merges,
        repository: Repository,
        garbage: Garbage,
        store: Store,
        tasks: RayTasks,
        stopping: threading.Event,
    ) -> None:
        self._job = job
        self._settings = settings
        self._merges = merges
        self._repository = repository
        self._garbage = garbage
        self._store = store
        self._tasks = tasks
        self._stopping = stopping
        self._plan = Plan.model_validate(job.plan)
        self._work = work_of(self._plan, settings, target=job.target)
        self._units: dict[str, MergeUnit] = {}
        self._renewed = self._held = 0.0

    def carry_out(self) -> None:
        """Until the job has ended. Raises Stopped, LeaseLost, RegistryUnavailable, and LoomErrors that are its end."""
        try:
            self._tick()
            if self._plan.recipe.search is not None:
                self._search()
            if not self._is_published():
                self._make()
                self._verify()
            self._publish()
        except Cancelled:
            self.give_up(MergeState.CANCELLED, "Cancelled; nothing was published.")

    def give_up(self, state: MergeState, message: str) -> None:
        """End the job without a result: nothing of it is left."""
        self._work.workspace().discard()
        self._merges.finish(self._job, state, message)
        self._garbage.release(self._job.holder)

    def _search(self) -> None:
        spec = self._plan.recipe.search
        assert spec is not None
        self._move(MergeState.SEARCHING, f"Looking for weights: {spec.trials} trials on {spec.examples}.")
        trials, result = list(self._job.trials), None
        call = Call(step="search_weights")
        work = replace(self._work, known=tuple(trials))
        with self._tasks.started(work, [call]) as going:
            for progress in going:
                self._tick()
                if progress.value is not None and "winner" in progress.value:
                    result = progress.value
                elif progress.value is not None and progress.value not in trials:
                    trials.append(progress.value)
                    self._merges.tried(self._job, trials)
        if result is None:
            raise MergeRefused("The search ended without a result; start the merge again.", problems=[])
        weights = result["winner"]["weights"]
        recipe = self._plan.recipe.weighing(weights)
        version = recipe.arithmetic.version(self._plan.versions)
        self._plan = self._plan.model_copy(update={"recipe": recipe, "version": version, "search": result})
        self._work = work_of(self._plan, self._settings, target=self._job.target)
        said = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
        best = result["winner"]
        self._move(
            MergeState.MERGING,
            f"Found {said}: {best['search']:.3f} on what was searched, {best['held_out']:.3f} on what was held out.",
        )

    def _make(self) -> None:
        plan = self._plan
        is_checkpoint = plan.recipe.product == "checkpoint"
        units = [MergeUnit(unit=unit.name, kind="merge", num_bytes=unit.num_bytes) for unit in plan.units]
        if is_checkpoint:
            units += [MergeUnit(unit=check_of(u.name), kind="check", num_bytes=u.num_bytes) for u in plan.units]
        units.append(MergeUnit(unit=ASSEMBLY, kind="assemble", num_bytes=0 if is_checkpoint else plan.output_bytes))
        if plan.recipe.verify.probes:
            units.append(MergeUnit(unit=PROBE, kind="probe", num_bytes=0))
        workspace = self._work.workspace()
        self._units = {unit.unit: self._as_recorded(unit, workspace.record(unit.unit)) for unit in units}
        self._merges.set_units(self._job, self._units.values())
        done = sum(self._units[unit.name].state == "done" for unit in plan.units)
        known = f", {done} done before" if done else ""
        what = "shards of the base" if is_checkpoint else "parts of the adapter"
        self._move(MergeState.MERGING, f"Merging {len(plan.units)} {what}{known}.")
        self._run([self._call("merge_unit", unit.name, unit.name, plan.memory_bytes) for unit in plan.units])
        memory = SMALL_TASK_BYTES if is_checkpoint else plan.memory_bytes
        self._run([self._call("assemble", None, ASSEMBLY, memory)])

    def _verify(self) -> None:
        plan = self._plan
        self._move(MergeState.VERIFYING, "Verifying.")
        if plan.recipe.product == "checkpoint":
            named = [(unit.name, check_of(unit.name)) for unit in plan.units]
            self._run([self._call("check_unit", unit, record, plan.memory_bytes) for unit, record in named])
        if plan.recipe.verify.probes:
            self._run([self._call("probe", None, PROBE, plan.probe_bytes)])

    def _publish(self) -> None:
        self._move(MergeState.PUBLISHING, "Publishing.")
        plan, job, workspace = self._plan, self._job, self._work.workspace()
        if plan.recipe.product == "adapter" and not job.target:
            report = self._report()
            self._register(report)
            return
        manifest = workspace.published()
        if manifest is None:
            report = self._report()
            if plan.recipe.product == "adapter":
                for unit in plan.units:  # what the adapter was made of
                    workspace.remove(unit.file)
            manifest = manifest_of(
                plan, report, job=job.id, actor=job.actor, created_at=datetime.now(UTC).isoformat()
            )
            workspace.publish(manifest)
        checkpoint = None
        if plan.recipe.product == "checkpoint" and not job.target:
            checkpoint = Checkpoint(
                name=plan.recipe.name,
                version=manifest["sha256"],
                location=workspace.location,
                base=plan.base.name,
                job=job.id,
                parents=plan.versions,
                num_bytes=plan.output_bytes,
                created_at=datetime.now(UTC),
            )
        self._end(manifest, f"Published at {workspace.location}.", checkpoint)

    def _register(self, report: dict[str, Any]) -> None:
        plan, job = self._plan, self._job
        admitted: dict[str, Any] = {}
        with self._tasks.started(self._work, [Call(step="admit", memory_bytes=plan.memory_bytes)]) as going:
            for progress in going:
                self._tick()
                admitted = progress.value or admitted
        version = admitted["version"]
        lineage = {
            "job": job.id,
            "method": plan.recipe.semantics,
            "parents": [
                {"adapter": found.adapter, "version": found.version, "weight": said.model_dump(mode="json")["weight"]}
                for said in plan.recipe.inputs
                for found in plan.inputs
                if found.adapter == said.adapter
            ],
        }
        self._repository.add(
            plan.recipe.name,
            version,
            admitted["location"],
            {**admitted["info"], "merge": lineage},
            source=f"merge {job.id}",
            activate=plan.recipe.activate,
            actor=job.actor,
            is_there=lambda: self._store.holds(version),
        )
        report = {**report, "registered": f"{plan.recipe.name}@{version}"}
        self._end(report, f"Registered as {plan.recipe.name}@{version[:SHOWN]}.", None)

    def _end(self, report: dict[str, Any], message: str, checkpoint: Checkpoint | None) -> None:
        self._merges.finish(self._job, MergeState.SUCCEEDED, message, report=report, checkpoint=checkpoint)
        self._garbage.release(self._job.holder)
        self._work.workspace().discard()

    def _report(self) -> dict[str, Any]:
        workspace = self._work.workspace()
        records = {unit.name: workspace.record(unit.name) or {} for unit in self._plan.units}
        assembly = (workspace.record(ASSEMBLY) or {})["report"]
        probe = (workspace.record(PROBE) or {}).get("report")
        # A probe tells again what the assembly's check did.
        told = assembly["warnings"] if probe is None else probe["warnings"]
        found = [warning for record in records.values() for warning in record["report"].get("warnings", [])]
        warnings = [*self._plan.warnings, *found, *told]
        return report_of(self._plan, records, assembly, probe=probe, warnings=warnings, search=self._plan.search)

    def _run(self, calls: Sequence[tuple[Call, str]]) -> None:
        """Those calls that are not recorded as done, all at once; Ray has them wait for room."""
        workspace = self._work.workspace()
        left = {call: record for call, record in calls if not self._work.is_done(workspace.record(record))}
        needed = max((call.memory_bytes for call in left), default=0)
        if needed > self._tasks.largest_memory():
            said = f"No node has the {needed / 1e9:.1f} GB of memory that a task may need; they wait for one."
            self._merges.say(self._job, said, level="warning")
        with self._tasks.started(self._work, list(left)) as going:
            for progress in going:
                self._tick()
                if progress.call is not None:
                    self._note(progress, left[progress.call])

    def _note(self, progress: Progress, record: str) -> None:
        unit = self._units[record]
        if not progress.is_done:
            unit = replace(unit, state="running", done_bytes=min(unit.num_bytes, progress.value))
        else:
            unit = self._as_recorded(unit, self._work.workspace().record(record))
            peak = "" if unit.peak_bytes is None else f", {unit.peak_bytes / 1e6:.0f} MB at most"
            self._merges.say(self._job, f"{record} done on {unit.node} in {unit.seconds:.1f} s{peak}.")
        self._units[record] = unit
        self._merges.set_units(self._job, [unit], first=list(self._units).index(record))

    def _as_recorded(self, unit: MergeUnit, record: dict[str, Any] | None) -> MergeUnit:
        if record is None or not self._work.is_done(record):
            return unit
        return replace(
            unit,
            state="done",
            done_bytes=unit.num_bytes,
            node=f"{record['node']}/{record['pid']}",
            seconds=record["seconds"],
            peak_bytes=record["peak_bytes"],
        )

    def _is_published(self) -> bool:
        """Whether this job's own result is there already: then it ended between that and saying so. Raises
        MergeRefused where another's has the name."""
        if self._plan.recipe.product == "adapter" and not self._job.target:
            return False
        manifest = self._work.workspace().published()
        if manifest is not None and manifest.get("job") != self._job.id:
            raise MergeRefused(
                f"'{self._work.site.name}' exists already; choose another name or remove it.", problems=[]
            )
        return manifest is not None

    def _call(self, step: str, unit: str | None, record: str, memory_bytes: int) -> tuple[Call, str]:
        return Call(step=step, unit=unit, memory_bytes=memory_bytes), record

    def _move(self, state: MergeState, message: str) -> None:
        """Raises Cancelled, so that a cancellation that was acknowledged is seen before the result is published."""
        if not self._merges.move(self._job, state, message, plan=self._plan.model_dump(mode="json")):
            raise Cancelled

    def _tick(self) -> None:
        """Keep the lease, and hear whether to stop. Raises Stopped, Cancelled, LeaseLost."""
        if self._stopping.is_set():
            raise Stopped
        now = time.monotonic()
        if now - self._renewed < RENEW_S:
            return
        self._renewed = now
        try:
            if self._merges.renew(self._job, LEASE_S).is_cancelled:
                raise Cancelled
            if now - self._held > HOLD_S / 4 or not self._held:
                for version in self._plan.versions.values():
                    self._garbage.hold(version, self._job.holder, HOLD_S)
                self._held = now
        except RegistryUnavailable:
            return  # nobody else can claim the job either; the next tick tries again
