"""Staging that ended jobs left: a task that is killed late writes into what was discarded under it."""

from __future__ import annotations

import logging

from lora_runtime.errors import LoomError
from lora_runtime.merge.job import Plan
from serve.config import Settings
from serve.jobs.workload import work_of
from serve.registry.merges import MergeJob, Merges

LOOK_BACK = 200
"""So many of the newest jobs are looked at."""
SETTLE_S = 300.0
"""Until a task that was told to end is gone, with clocks of different machines."""

log = logging.getLogger(__name__)


def sweep(merges: Merges, settings: Settings, *, now: float, since: float = 0.0) -> list[str]:
    """Discard what is staged for jobs that ended after ``since`` and was last written to SETTLE_S before ``now``, both
    in seconds since the epoch; the jobs' ids.

    What a job that has not ended would go on with stays, however old it is, also where it is staged for an earlier one
    of the same plan. Raises RegistryUnavailable; a place that cannot be reached is left for the next time.
    """
    swept = []
    for job in merges.all(limit=LOOK_BACK):
        if job.ended_at is None or job.ended_at.timestamp() < since or merges.under_way(job.name, job.target):
            continue
        try:
            if _discarded(job, settings, now):
                swept.append(job.id)
        except (LoomError, OSError, ValueError) as error:  # ValueError: a plan of an earlier release
            log.info("what %s may have left cannot be looked at: %s", job.id, error)
    return swept


def _discarded(job: MergeJob, settings: Settings, now: float) -> bool:
    workspace = work_of(Plan.model_validate(job.plan), settings, target=job.target).workspace()
    written = workspace.written_at()
    if written is None or now - written < SETTLE_S:
        return False
    workspace.discard()
    log.info("removed what %s left staged", job.id)
    return True
